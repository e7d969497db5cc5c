// A warp routes a token. Sums go in the CPU's order, so that equal scores stay equal and ties break the same way.
#include "gpu/ops/route.h"

#include "gpu/ops/numbers.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;
using Score = shard::RouterConfig::Score;

constexpr std::int64_t kMaxGroups = 64;
constexpr std::uint32_t kTaken = 0xffffffffu;

/// Larger numbers first, of equal ones the first; what is taken counts as 0, less than any.
GPU_CODE unsigned long long choice_key(float value, unsigned index) {
  if (as_bits(value) == kTaken) return 0;
  const auto bits = as_bits(value + 0.0f);  // −0 becomes 0
  const auto ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - index);
}
/// Always below `count`: NaNs choose anything, but an expert.
GPU_CODE int chosen_index(unsigned long long key, int count) {
  const auto index = 0xffffffffu - static_cast<unsigned>(key);
  return index < static_cast<unsigned>(count) ? static_cast<int>(index) : 0;
}

struct Route {
  static constexpr unsigned kTokens = 4, kThreads = 32 * kTokens;
  struct Shared {
    float score[kTokens][kMaxExperts], choice[kTokens][kMaxExperts];
    float group[kTokens][kMaxGroups];
    bool kept[kTokens][kMaxGroups];
    float weight[kTokens][kMaxTopk];
    int expert[kTokens][kMaxTopk];
    float sum[kTokens];
  };
  struct Own {
    float top;
    unsigned long long key;
  };
  Numbers logits, bias;
  std::int32_t* expert;
  float* weight;
  Index tokens, stride;
  int experts, topk, groups, group_topk, group_best;
  Score score;
  float scaling;
  bool pre_softmax, renormalize, rounds;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const auto first = static_cast<Index>(block.x()) * kTokens;
    block.each([&](unsigned thread, Own& own) {
      const auto t = thread / 32;
      own.top = lowest();
      if (first + t >= tokens) return;
      for (int e = static_cast<int>(thread % 32); e < experts; e += 32) {
        const float x = logits[(first + t) * stride + e];
        own.top = larger(own.top, x);
        if (score == Score::Sigmoid) s.score[t][e] = sigmoid(x);
        else if (score == Score::SqrtSoftplus) s.score[t][e] = sqrtf(x > 20 ? x : log1pf(expf(x)));
        else s.score[t][e] = x;
      }
    });
    block.warp_max(&Own::top);
    if (score == Score::Softmax && pre_softmax) {
      block.each([&](unsigned thread, Own& own) {
        for (int e = static_cast<int>(thread % 32); e < experts; e += 32) s.score[thread / 32][e] = expf(s.score[thread / 32][e] - own.top);
      });
      block.each([&](unsigned thread, Own&) {
        if (thread % 32) return;
        float sum = 0;
        for (int e = 0; e < experts; ++e) sum += s.score[thread / 32][e];
        s.sum[thread / 32] = sum;
      });
      block.each([&](unsigned thread, Own&) {
        for (int e = static_cast<int>(thread % 32); e < experts; e += 32) s.score[thread / 32][e] /= s.sum[thread / 32];
      });
    }
    block.each([&](unsigned thread, Own&) {
      for (int e = static_cast<int>(thread % 32); e < experts; e += 32)
        s.choice[thread / 32][e] = s.score[thread / 32][e] + (bias.given() ? bias[e] : 0.0f);
    });
    if (groups > 1 && group_topk > 0) limit_groups(block);
    for (int k = 0; k < topk; ++k) {
      take_largest(block, experts, s.choice, [&](unsigned t, int index) {
        s.expert[t][k] = index;
        s.weight[t][k] = s.score[t][index];
      });
    }
    block.each([&](unsigned thread, Own&) {
      const auto t = thread / 32;
      if (thread % 32 || first + t >= tokens) return;
      auto* const w = s.weight[t];
      const bool soft = score == Score::Softmax;
      if (soft && !pre_softmax) {
        float top = w[0], sum = 0;
        for (int k = 1; k < topk; ++k) top = larger(top, w[k]);
        for (int k = 0; k < topk; ++k) sum += w[k] = expf(w[k] - top);
        for (int k = 0; k < topk; ++k) w[k] /= sum;
      }
      if (renormalize && (soft || topk > 1)) {
        float sum = 0;
        for (int k = 0; k < topk; ++k) sum += w[k];
        if (!soft) sum += 1e-20f;
        for (int k = 0; k < topk; ++k) w[k] /= sum;
      }
      for (int k = 0; k < topk; ++k) {
        const float value = w[k] * scaling;
        expert[(first + t) * topk + k] = s.expert[t][k];
        weight[(first + t) * topk + k] = rounds ? rounded<Bf16>(value) : value;
      }
    });
  }

 private:
  /// Calls found(token, index) for the largest of x[token][0 … count) that is not taken yet.
  template <typename Block, std::size_t kWidth, typename Found>
  GPU_CODE void take_largest(Block& block, int count, float (&x)[kTokens][kWidth], Found found) const {
    block.each([&](unsigned thread, Own& own) {
      own.key = 0;
      for (int i = static_cast<int>(thread % 32); i < count; i += 32) {
        const auto key = choice_key(x[thread / 32][i], static_cast<unsigned>(i));
        own.key = key > own.key ? key : own.key;
      }
    });
    block.warp_max(&Own::key);
    block.each([&](unsigned thread, Own& own) {
      if (thread % 32) return;
      const auto index = chosen_index(own.key, count);
      found(thread / 32, index);
      x[thread / 32][index] = as_float(kTaken);
    });
  }
  /// Experts outside the best groups can no longer be chosen.
  template <typename Block>
  GPU_CODE void limit_groups(Block& block) const {
    auto& s = block.shared();
    const int size = experts / groups;
    block.each([&](unsigned thread, Own&) {
      const auto t = thread / 32;
      for (int g = static_cast<int>(thread % 32); g < groups; g += 32) {
        // The best in falling order: each time the largest that comes behind the one before.
        auto before = ~0ull;
        float sum = 0;
        for (int n = 0; n < group_best; ++n) {
          auto best = 0ull;
          for (int i = 0; i < size; ++i) {
            const auto key = choice_key(s.choice[t][g * size + i], static_cast<unsigned>(i));
            if (key < before && key > best) best = key;
          }
          sum += s.choice[t][g * size + chosen_index(best, size)];
          before = best;
        }
        s.group[t][g] = sum;
        s.kept[t][g] = false;
      }
    });
    for (int k = 0; k < group_topk; ++k) take_largest(block, groups, s.group, [&](unsigned t, int index) { s.kept[t][index] = true; });
    block.each([&](unsigned thread, Own&) {
      for (int e = static_cast<int>(thread % 32); e < experts; e += 32)
        if (!s.kept[thread / 32][e / size]) s.choice[thread / 32][e] = lowest();
    });
  }
};

/// A block counts one expert's tokens; a thread has a run of them.
struct CountTokens {
  static constexpr unsigned kThreads = 256;
  struct Shared {};
  struct Own {
    unsigned count;
  };
  const std::int32_t* expert;
  std::int32_t* counts;
  Index entries;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each([&](unsigned thread, Own& own) {
      own.count = 0;
      for (Index i = thread; i < entries; i += kThreads) own.count += expert[i] == static_cast<std::int32_t>(block.x());
    });
    block.sum(&Own::count);
    block.each([&](unsigned thread, Own& own) {
      if (thread == 0) counts[block.x()] = static_cast<std::int32_t>(own.count);
    });
  }
};

/// Counts, in place, become offsets.
struct Offsets {
  static constexpr unsigned kThreads = 256;
  struct Shared {
    std::int32_t count[kMaxExperts];
  };
  struct Own {};
  std::int32_t* offsets;
  std::int32_t* tiles;
  int experts;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    block.each([&](unsigned thread, Own&) {
      for (int e = static_cast<int>(thread); e < experts; e += kThreads) s.count[e] = offsets[e];
    });
    block.each([&](unsigned thread, Own&) {
      for (int e = static_cast<int>(thread); e <= experts; e += kThreads) {
        std::int32_t rows = 0, runs = 0;
        for (int i = 0; i < e; ++i) {
          rows += s.count[i];
          runs += (s.count[i] + static_cast<std::int32_t>(kExpertTile) - 1) / static_cast<std::int32_t>(kExpertTile);
        }
        offsets[e] = rows;
        tiles[e] = runs;
      }
    });
  }
};

/// A block writes one expert's rows in the tokens' order: slice after slice of the entries, of which each thread has a run.
template <int N>
struct Place {
  static constexpr unsigned kThreads = 256, kRun = 16, kTeam = 16;
  struct Shared {
    unsigned count[kThreads], team[kThreads / kTeam];  ///< of the expert's entries, by thread and by sixteen threads
  };
  struct Own {
    unsigned found, before;  ///< bits of the run; the expert's entries in earlier slices
  };
  const std::int32_t* expert;
  const float* from_weight;
  Permutation out;
  Index entries, topk;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const auto mine = static_cast<std::int32_t>(block.x());
    block.each_apart([](unsigned, Own& own) { own.before = 0; });
    for (Index slice = 0; slice < entries; slice += kThreads * kRun) {
      block.each([&](unsigned thread, Own& own) {
        own.found = s.count[thread] = 0;
        const auto first = slice + thread * kRun;
        for (unsigned i = 0; i < kRun; i += N) {
          if (first + i >= entries) break;
          const auto pack = load_pack<N>(expert + first + i);
          for (unsigned j = 0; j < N; ++j) {
            const bool is_mine = pack.item[j] == mine;
            own.found |= static_cast<unsigned>(is_mine) << (i + j);
            s.count[thread] += is_mine;
          }
        }
      });
      block.each([&](unsigned thread, Own&) {
        if (thread >= kThreads / kTeam) return;
        s.team[thread] = 0;
        for (unsigned i = 0; i < kTeam; ++i) s.team[thread] += s.count[thread * kTeam + i];
      });
      block.each([&](unsigned thread, Own& own) {
        auto row = out.offsets[mine] + static_cast<std::int32_t>(own.before);
        for (unsigned i = 0; i < kThreads / kTeam; ++i) {
          if (i < thread / kTeam) row += static_cast<std::int32_t>(s.team[i]);
          own.before += s.team[i];
        }
        for (unsigned i = thread / kTeam * kTeam; i < thread; ++i) row += static_cast<std::int32_t>(s.count[i]);
        for (unsigned i = 0; i < kRun; ++i) {
          if (!(own.found >> i & 1)) continue;
          const auto entry = slice + thread * kRun + i;
          out.token[row] = static_cast<std::int32_t>(entry / topk);
          out.weight[row] = from_weight[entry];
          out.row[entry] = row++;
        }
      });
    }
  }
};

template <typename T, int N>
struct Combine {
  static constexpr unsigned kThreads = 128;
  struct Shared {
    std::int32_t row[kMaxTopk];
  };
  struct Own {};
  T* out;
  const T* x;
  const std::int32_t* row;
  Index out_stride, x_stride, columns;
  int topk;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const auto token = static_cast<Index>(block.x());
    block.each([&](unsigned thread, Own&) {  // rows ascend with experts
      if (static_cast<int>(thread) >= topk) return;
      const auto mine = row[token * topk + thread];
      int place = 0;
      for (int k = 0; k < topk; ++k) place += row[token * topk + k] < mine;
      s.row[place] = mine;
    });
    block.each([&](unsigned thread, Own&) {
      for (Index c = static_cast<Index>(thread) * N; c < columns; c += kThreads * N) {
        Pack<T, N> sum{};
        for (int k = 0; k < topk; ++k) {
          const auto part = load_pack<N>(x + s.row[k] * x_stride + c);
          for (int j = 0; j < N; ++j) sum.item[j] = narrow<T>(widen(sum.item[j]) + widen(part.item[j]));
        }
        store_pack<N>(out + token * out_stride + c, sum);
      }
    });
  }
};

void check_topk(Index topk) {
  shard::require(topk > 0 && topk <= kMaxTopk, shard::Code::Device,
                 [&] { return fmt::format("device: the router takes {} experts; at most {} are provided for", topk, kMaxTopk); });
}
void check_experts(Index experts) {
  shard::require(experts > 0 && experts <= kMaxExperts, shard::Code::Device,
                 [&] { return fmt::format("device: {} experts; at most {} are provided for", experts, kMaxExperts); });
}

}  // namespace

void route(StreamView on, const shard::RouterConfig& config, const View& logits, const View& bias, bool rounded, std::int32_t* expert,
           float* weight) {
  const auto experts = logits.columns;
  check_experts(experts);
  check_topk(config.topk);
  shard::require(config.topk <= experts, shard::Code::Mismatch,
                 [&] { return fmt::format("model: the router takes {} of {} experts", config.topk, experts); });
  const bool grouped = config.num_groups > 1 && config.group_topk > 0;
  shard::require(!grouped || (experts % config.num_groups == 0 && config.group_topk <= config.num_groups), shard::Code::Mismatch,
                 [&] { return fmt::format("model: {} experts in {} groups", experts, config.num_groups); });
  shard::require(!grouped || config.num_groups <= kMaxGroups, shard::Code::Device,
                 [&] { return fmt::format("device: {} groups of experts; at most {} are provided for", config.num_groups, kMaxGroups); });
  const auto best = config.group_rule == shard::RouterConfig::GroupRule::Max ? 1
                    : grouped                                                ? std::min(config.group_best, experts / config.num_groups)
                                                                             : 1;
  const Route kernel{numbers(logits),
                     numbers(bias),
                     expert,
                     weight,
                     logits.rows,
                     logits.stride,
                     static_cast<int>(experts),
                     static_cast<int>(config.topk),
                     static_cast<int>(config.num_groups),
                     static_cast<int>(config.group_topk),
                     static_cast<int>(best),
                     config.score,
                     static_cast<float>(config.scaling),
                     config.pre_softmax,
                     config.renormalize,
                     rounded};
  launch(on, {blocks_for(static_cast<std::uint64_t>(logits.rows), Route::kTokens)}, kernel);
}

void permute(StreamView on, std::int64_t tokens, std::int64_t topk, std::int64_t experts, const std::int32_t* expert, const float* weight,
             const Permutation& out) {
  check_experts(experts);
  check_topk(topk);
  shard::require(tokens * topk < (std::int64_t{1} << 31), shard::Code::Device,
                 [&] { return fmt::format("device: {} tokens for {} experts each", tokens, topk); });
  launch(on, {static_cast<std::uint64_t>(experts)}, CountTokens{expert, out.offsets, tokens * topk});
  launch(on, {1}, Offsets{out.offsets, out.tiles, static_cast<int>(experts)});
  const auto place = [&]<int N>() { launch(on, {static_cast<std::uint64_t>(experts)}, Place<N>{expert, weight, out, tokens * topk, topk}); };
  tokens* topk % 4 == 0 && reinterpret_cast<std::uintptr_t>(expert) % 16 == 0 ? place.template operator()<4>() : place.template operator()<1>();
}

void combine(StreamView on, const View& out, const View& x, std::int64_t topk, const std::int32_t* row) {
  check_topk(topk);
  shard::require(out.type == x.type && out.columns == x.columns && x.rows == out.rows * topk, shard::Code::Device,
                 [] { return "device: experts' rows of another shape than the sum"; });
  with_activation_type(out.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      launch(on, {static_cast<std::uint64_t>(out.rows)},
             Combine<T, N>{elements<T>(out), elements<const T>(x), row, out.stride, x.stride, out.columns, static_cast<int>(topk)});
    };
    constexpr int n = kPack<T>;
    in_packs(out, n) && in_packs(x, n) ? run.template operator()<n>() : run.template operator()<1>();
  });
}

}  // namespace gpu
