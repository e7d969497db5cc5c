// What a checkpoint knows of Hugging Face: its family, its config.json, and the small files beside the weights.
#pragma once

#include "formats/hf/family.h"

#include <filesystem>
#include <string>
#include <vector>

namespace formats::hf {

struct State {
  Family family;
  nlohmann::ordered_json config;        ///< as the file says, in its order
  std::filesystem::path folder;         ///< where config.json and the small files lie
  std::vector<std::string> files;       ///< config, generation config, tokenizer: names, config.json among them
  bool rewritten = false;               ///< config differs from the file: weights are given in another form than stored
};

}  // namespace formats::hf
