// Megatron's argparse.Namespace: the model's sizes and the run's layout, read from it and written back into it.
#pragma once

#include "formats/pickle.h"
#include "libshard/family.h"
#include "libshard/layout.h"

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace formats::megatron {

/// A view of one Namespace; what is absent or None reads as nullopt.
class Args {
 public:
  Args(const pickle::Graph& graph, pickle::Ref space) : graph_(graph), space_(space) {}
  bool present() const { return !graph_.is_none(space_); }
  std::optional<shard::Index> integer(std::string_view name) const;
  bool flag(std::string_view name) const;  ///< false where absent
  std::optional<std::string> text(std::string_view name) const;
  std::optional<pickle::Ref> value(std::string_view name) const;

 private:
  const pickle::Graph& graph_;
  pickle::Ref space_;
};

/// Sizes and switches for the family tables. `given` overrides.
shard::Params params_of(const Args& args, const std::map<std::string, shard::Index>& given);
shard::Parallel parallel_of(const Args& args);
/// Which layers are mixtures of experts, by args.moe_layer_freq (every n-th, or a list); empty where it does not say.
std::vector<bool> moe_layers_of(const pickle::Graph& graph, const Args& args, shard::Index layers);
/// Whether layers are saved under keys of their own, whichever kind they are. Source: TransformerBlock.sharded_state_dict.
bool non_homogeneous_layers(const pickle::Graph& graph, const Args& args);
/// What shapes the model, its layout and its vocabulary, as text by attribute name: every rank's args say the same of it.
std::map<std::string_view, std::string> shaping_args(const pickle::Graph& graph, pickle::Ref args);
/// The text form of args.pipeline_model_parallel_layout, which may be a text, a list of lists, or an object.
std::string layout_text(const pickle::Graph& graph, pickle::Ref value);

struct ArgsChange {
  shard::Parallel parallel;
  shard::Index padded_vocab = 0;
  shard::Index rank = 0, world_size = 1;
  std::string ckpt_format;             ///< "torch" or "torch_dist"
  shard::Index mtp_layers = 0;         ///< that the target holds
  std::optional<shard::Index> vocab_multiple = {};
  std::optional<shard::DType> dtype = {};  ///< that the weights were cast to
  shard::Params sizes = {};            ///< of the model: what args lack of them is added
};
/// Who reads the copy: torch.load(weights_only=True) with argparse.Namespace allowed, or every Megatron-Core since 0.12,
/// which allows a few classes of its own.
enum class Audience { Torch, Megatron };

/// A copy of `args` in `to`, changed to a new layout. Attributes whose class the audience refuses (with the whole file)
/// are left out; their names are added to `dropped`.
pickle::Ref copy_args(pickle::Graph& to, const pickle::Graph& from, pickle::Ref args, const ArgsChange& change, Audience audience,
                      std::set<std::string>& dropped);

}  // namespace formats::megatron
