// An opened checkpoint of any format: what is in it, as stored and as logical tensors, and everything that is no tensor.
#pragma once

#include "formats/local.h"
#include "formats/pickle.h"
#include "libshard/family.h"
#include "libshard/layout.h"
#include "libshard/state_dict.h"
#include "libshard/translate.h"

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

namespace formats {

namespace hf {
struct State;
struct Adapter;
}

/// What a module keeps beside its weights (`_extra_state`): nothing, a byte tensor, or some pickled object.
struct ExtraState {
  enum class Kind { None, Tensor, Object } kind = Kind::None;
  std::string bytes;                             ///< of the tensor (uint8)
  std::shared_ptr<const pickle::Graph> graph;    ///< of the object
  pickle::Ref ref = 0;
};

/// Not a tensor of the model: dropped, with the reason, or carried.
struct Dropped {
  std::string key, why;
};

/// What only Megatron checkpoints have.
struct MegatronState {
  std::shared_ptr<const pickle::Graph> common;   ///< holds args and the common state
  pickle::Ref args = 0;                          ///< argparse.Namespace; none() where the checkpoint has none
  std::map<std::string, pickle::Ref> items;      ///< other top-level items that every layout can carry
  std::map<std::string, ExtraState> extra;       ///< by the logical name of the module's first tensor
  bool te = false;                               ///< a key or an extra state speaks for Transformer Engine
  bool stacked = false;                          ///< torch_dist: layers are one tensor
  shard::Spellings rows;                         ///< used by each layer
  shard::Index layers = 0, experts = 0, mtp_layers = 0;
};

struct Checkpoint {
  std::string format;                            ///< "torch_dist", "mp_rank", "dcp", "hf", "pt"
  std::filesystem::path path, folder;            ///< as asked for; where the files lie
  std::optional<std::int64_t> iteration;
  std::shared_ptr<FilePool> files;
  shard::ShardedStateDict stored;                ///< keys as spelled, with global layer numbers
  shard::ShardedStateDict logical;               ///< what hash, diff and plans speak of; keys of their own where no family fits
  std::set<std::string> optimizer;               ///< stored keys of optimizer tensors
  std::optional<shard::Parallel> parallel;
  std::string family;                            ///< "" where none is recognised
  std::optional<bool> tied;
  shard::Params params;
  std::optional<shard::Index> vocab;             ///< true size
  std::optional<shard::Index> recorded_vocab;    ///< what the checkpoint says of it, where --vocab-size says otherwise
  std::vector<shard::Finding> findings;
  std::vector<Dropped> not_carried;              ///< RNG, scheduler and the like
  std::set<std::string> quantised;               ///< stored keys of weights and their scales, which are their own logical names
  std::vector<std::filesystem::path> beside;     ///< configuration and tokenizer of a folder that no family speaks for
  std::vector<std::string> unmatched;            ///< patterns of --drop that fit nothing here
  std::map<std::uint32_t, shard::Place> widened; ///< logical streams that are computed of one stored tensor → its place
  std::vector<std::string> optimizer_files;      ///< torch files beside the ranks': only verify looks at their bytes
  std::vector<std::string> notes;                ///< what became of the weights on the way in, worth saying
  bool needs_weights_only = false;               ///< holds optimizer state that cannot be placed
  std::optional<MegatronState> megatron;
  std::shared_ptr<const hf::State> hf;           ///< of a Hugging Face folder, or carried beside a Megatron one
  std::shared_ptr<const hf::Adapter> adapter;    ///< where this is a LoRA adapter, not a model
  std::string embedded_config;                   ///< config.json that an HDF5 file brings inside
  struct Sizes {
    shard::Index layers = 0, experts = 0, mtp_layers = 0;
  } sizes;                                       ///< as numbered by the keys of a Hugging Face folder
  std::map<std::string, std::string> metadata;   ///< safetensors' __metadata__
  std::map<std::string, std::vector<std::variant<std::string, std::int64_t>>> nesting;  ///< dcp: a key's path in the state dict that was saved
};

struct OpenOptions {
  std::optional<std::int64_t> iteration;
  std::map<std::string, shard::Index> parameters;  ///< given by hand: "heads" → 32
  std::optional<shard::Index> vocab;
  std::string family;                              ///< a Hugging Face family by name or file, over what config.json says
  std::vector<std::string> drop;                   ///< globs over logical and stored keys
  std::optional<shard::DType> dequantise;          ///< quantised weights and their scales become one tensor of this type
  std::filesystem::path adapter;                   ///< a LoRA adapter that is merged into the weights; empty: none
  bool places = true;                              ///< false: metadata only, payloads are not located
  unsigned threads = 1;
};

/// The checkpoint at `path`, recognised by content. Throws NotFound, BadFormat or Mismatch.
Checkpoint open(const std::filesystem::path& path, const OpenOptions& options = {});

/// --vocab-size instead of what the checkpoint records, which is in `checkpoint.vocab` before.
void take_vocabulary(Checkpoint& checkpoint, const OpenOptions& options);

/// Whether a Megatron run folder calls an iteration's folder so: "iter_0000010", "release".
bool names_iteration(std::string_view name);

/// "decoder.*" style: '*' any text, '?' one letter.
bool glob(std::string_view pattern, std::string_view text);

}  // namespace formats
