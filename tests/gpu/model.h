// A bundled model and tokens for it, run by a device.
#pragma once

#include "formats/kernels.h"
#include "formats/model_config.h"
#include "gpu/model/language_device.h"
#include "lm/model_run.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <numeric>

namespace models {

using namespace lm;

struct Model {
  formats::Checkpoint checkpoint;
  shard::TransformerConfig config;
  Batch batch;
  std::vector<MtpStep> steps;

  explicit Model(const std::string& name) : checkpoint(formats::open(std::string(SHARDKIT_TEST_DATA) + "/" + name, {})), config(formats::model_config(checkpoint)) {
    batch.batch = 2;
    batch.length = 19;
    for (Index i = 0; i < 38; ++i) {
      batch.input_ids.push_back(i * 37 % 200);
      batch.labels.push_back((i + 1) * 37 % 200);
      batch.position_ids.push_back(i % 19);
    }
  }
  /// A step of depth 0 for `rows` tokens.
  void add_step(Index rows) {
    MtpStep step;
    step.in_hidden = Tensor(rows, config.hidden_size);
    for (std::size_t i = 0; i < step.in_hidden.values().size(); ++i) step.in_hidden.values()[i] = static_cast<float>(std::sin(static_cast<double>(i)));
    for (Index r = 0; r < rows; ++r) step.next_token_ids.push_back(r * 11 % 200), step.position_ids.push_back(r);
    steps.push_back(std::move(step));
  }
  RunReport run(Device& device, RunOptions options) const {
    const formats::LocalReader reader(checkpoint.logical, checkpoint.files);
    return run_model(reader, formats::kernels(), config, {batch, steps, 200, 200, {}, true}, options, device);
  }
  RunReport on_host(RunOptions options) const { return run(*host_device(), options); }
};

inline double furthest(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double out = 0;
  for (std::size_t i = 0; i < a.size(); ++i) out = std::max(out, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return out;
}

inline double mean(const std::vector<float>& values) { return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size()); }

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.rows() == b.rows() && a.columns() == b.columns() && std::memcmp(a.data(), b.data(), a.values().size_bytes()) == 0;
}

}  // namespace models
