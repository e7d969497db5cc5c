// What to copy: the join of two descriptions by box subtraction. Decides everything, moves nothing.
#pragma once

#include "libshard/state_dict.h"

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace shard {

/// One loop of a copy: how often, and how many bytes each end moves per turn.
struct Step {
  Index count, from, to;
  bool operator==(const Step&) const = default;
};

/// `run` source bytes that lie together at both ends, repeated by nested loops (outermost first).
struct Copy {
  std::uint32_t tensor;          ///< into Plan::tensors
  std::uint32_t from_stream, to_stream;
  std::uint64_t from, to;        ///< byte offsets within the streams
  std::vector<Step> steps;
  std::uint64_t run;
  DType from_type, to_type;      ///< equal unless elements are cast
  std::uint64_t bytes() const;   ///< source bytes moved
};

/// Two places of the *source* that should hold the same bytes of one box.
struct Comparison {
  Copy copy;
  Box box;
  bool tie;  ///< the copy of a tied tensor on another pipeline stage, not a replica
};

/// `Copy::from_stream` from here on names Plan::memory instead of a source stream.
constexpr std::uint32_t kMemoryStreams = 0xF0000000;

struct Plan {
  std::vector<std::string> tensors;
  std::vector<Copy> copies;
  std::vector<Comparison> comparisons;
  std::vector<std::vector<std::byte>> memory;     ///< constants that fill new padding rows
  std::vector<std::string> filled;                ///< what was filled, for the report
  bool partial = false;                           ///< one of several parts: other processes write the other streams
};

enum class Pad { Zeros, Last, Mean };

struct PlanOptions {
  Pad pad = Pad::Zeros;
  bool cast = false;              ///< dtypes may differ
  /// One row (dimension 0) of a tensor: the mean over the source's rows, in the source's dtype; for Pad::Mean.
  std::function<std::vector<std::byte>(const ShardedTensor&)> mean_row;
};

/// Every box of every target tensor from the source's shards; equal source boxes become comparisons.
/// Throws Mismatch where a box has no source, or shapes or dtypes differ.
Plan make_plan(const ShardedStateDict& source, const ShardedStateDict& target, const PlanOptions& options = {});

/// The comparisons alone: every replica in `source` against the first shard of its box.
Plan compare_replicas(const ShardedStateDict& source);

/// The part of a plan that process `index` of `count` executes: whole target streams, balanced by bytes.
Plan part_of(const Plan& plan, std::size_t index, std::size_t count);

/// Joins copies that continue each other at both ends, and orders them by target.
void coalesce(std::vector<Copy>& copies);

}  // namespace shard
