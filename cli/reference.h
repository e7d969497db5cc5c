// Tokens and reference values for validate: safetensors, .npy and text files in, plain vectors out.
#pragma once

#include "formats/checkpoint.h"
#include "lm/language_module.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace cli {

/// Named tensors of a safetensors file, widened.
struct Arrays {
  struct Array {
    shard::Shape shape;
    std::vector<double> values;
  };
  std::map<std::string, Array> arrays;
  const Array* find(const std::string& name) const;
};
/// Only names that `wanted` accepts are read. Throws NotFound, BadFormat.
Arrays read_arrays(const std::string& path, bool (*wanted)(const std::string& name));

/// NaN and a number are infinitely far apart; two NaNs, or equal infinities, are not.
double distance(double a, double b);

constexpr shard::Index kMostDepths = 64;

struct Reference {
  lm::Batch batch;
  std::vector<lm::MtpStep> steps;
  Arrays arrays;
  shard::Index vocab = 0;  ///< columns of its logits; 0 where it has none
};
/// Throws BadFormat where names or shapes are not those of a reference file.
Reference read_reference(const std::string& path, shard::Index hidden);

/// Ids from text, .npy or safetensors as rows: inputs are all but the last of a row, labels all but the first.
lm::Batch read_tokens(const std::string& path);
/// A text through the checkpoint's own tokenizer.json, as rows of at most `longest` tokens; what does not fill the last of
/// several rows is left out. Throws Mismatch where the checkpoint brings no tokenizer, Io once `stop` is set.
lm::Batch read_text_tokens(const std::string& path, const formats::Checkpoint& checkpoint, shard::Index longest, const std::atomic<bool>* stop);
lm::Batch batch_of(const std::vector<std::vector<shard::Index>>& rows, const std::string& where);

/// How far this run's values lie from a reference's.
class Comparer {
 public:
  Comparer(const Reference& reference, shard::Index depths);
  void on_logits(const lm::LogitsBlock& block);
  struct Figures {
    double max_abs_logits = 0, max_abs_loss = 0, mean_abs_loss = 0;
    double peak = 0, wanted_peak = 0;  ///< the largest logit here and in the reference, of those that are finite
    double sum_abs_logits = 0, logits_compared = 0;
    double mean_abs_logits() const { return sum_abs_logits / std::max(1.0, logits_compared); }
    bool logits = false, loss = false;
  };
  struct Step {
    double max_abs_hidden = 0, max_abs_logits = 0;
    bool hidden = false, logits = false;
  };
  /// What on_logits found here, for one that saw other blocks of the same logits.
  std::string tell() const;
  void hear(std::string_view text);
  /// After the pass.
  void finish(const lm::ForwardResult& result);
  Figures main;
  std::vector<Figures> mtp;
  std::vector<Step> steps;  ///< as Reference::steps
  std::vector<std::string> skipped;

 private:
  static void losses(const Arrays::Array* wanted, const std::vector<float>& found, const std::vector<shard::Index>& labels, Figures& into, std::size_t length, std::size_t rolled);
  const Reference& reference_;
};

}  // namespace cli
