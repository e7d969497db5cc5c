// What validate found, and its forms: JSON, JUnit XML, one HTML page, text.
#pragma once

#include "cli/print.h"
#include "cli/reference.h"
#include "lm/model_run.h"

#include <optional>
#include <string>
#include <vector>

namespace cli {

struct Check {
  std::string name, figure;   ///< "reference logits", "1.2e-05 ≤ 2.5e-05"
  bool ok = true;
};

struct MtpReport {
  shard::Index depth = 0;
  double loss = 0, scaled_loss = 0;          ///< as it is, and as training adds it to the main loss
  std::optional<Comparer::Figures> figures;
  std::optional<Comparer::Step> step;
};

struct Validation {
  std::string path, device = "cpu", family, input, compute;
  std::optional<shard::Parallel> layout;
  int tp = 1, pp = 1;
  shard::Index tokens = 0, vocab = 0;
  double loss = 0, loss_true_vocab = 0;
  double load_seconds = 0, forward_seconds = 0, all_seconds = 0;
  double peak_logit = 0;
  std::optional<Comparer::Figures> reference;
  std::vector<MtpReport> mtp;
  std::vector<lm::HiddenStats> hidden;
  std::vector<lm::WeightStats> weights;
  shard::Pipeline pipeline;                  ///< as stored
  bool tied = false;                         ///< the output head is the embedding
  std::vector<float> token_loss;             ///< over the true vocabulary
  std::vector<shard::Finding> findings;
  std::vector<Check> checks;
  std::vector<std::string> notes;
  std::uint64_t bytes_read = 0;
  bool ok() const;
};

/// The matrices of one decoder layer together.
struct LayerWeights {
  shard::Index layer = 0;
  double rms = 0, max_abs = 0;
};
std::vector<LayerWeights> layer_weights(const Validation& validation);
/// "TP 2, PP 2" as stored.
std::string layout_text(const Validation& validation);
Json validation_json(const Validation& validation);
void print_validation(const Validation& validation);
/// Throw Io.
void write_validation_junit(const std::string& path, const Validation& validation);
void write_validation_html(const std::string& path, const Validation& validation);

}  // namespace cli
