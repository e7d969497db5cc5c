// A digest of a tensor's bits that says nothing else, whoever computed it: the sum, modulo 2^64, over groups of up to eight neighbours in a
// row (the groups of all rows are numbered on) of
//   mix64(Σ_j bits_j · factor(j) + number · 0x9e3779b97f4a7c15),   bits_j those of the group's element j as f32.
// Factors are odd and mix64 is one to one: a change of one element always shows; more than one in a group hide each other once in 2^64.
// Of the same functions the kernels of devices are made.
#pragma once

#include "libshard/float_bits.h"

namespace lm {

constexpr int kDigestGroup = 8;

/// The finaliser of splitmix64.
SHARD_INLINE constexpr std::uint64_t mix64(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
SHARD_INLINE constexpr std::uint64_t digest_factor(int j) { return mix64(static_cast<std::uint64_t>(j) + 1) | 1; }

/// What a group adds to the digest; `sum` over its elements.
SHARD_INLINE constexpr std::uint64_t group_digest(std::uint64_t sum, std::uint64_t number) { return mix64(sum + number * 0x9e3779b97f4a7c15u); }

}  // namespace lm
