// Bytes between files and device memory past the host's: GPUDirect Storage, where it is there and works.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace gpu {

/// Thread safe. Both return false where this file, or this range, has to go another way.
struct DirectStorage {
  virtual ~DirectStorage() = default;
  /// `bytes` from `offset` of an open file to `at` in the device memory that starts at `memory`; done on return.
  virtual bool read(int descriptor, std::uint64_t offset, std::byte* memory, std::uint64_t at, std::uint64_t bytes) = 0;
  virtual bool write(int descriptor, std::uint64_t offset, const std::byte* memory, std::uint64_t at, std::uint64_t bytes) = 0;
  /// Memory that is used again and again, until it is forgotten: bytes need no stop on the device before it.
  virtual void remember(std::byte* /*memory*/, std::uint64_t /*bytes*/) {}
  virtual void forget(std::byte* /*memory*/) {}
};

struct DirectChoice {
  std::unique_ptr<DirectStorage> storage;  ///< null: bytes go through pinned memory
  std::string why;                         ///< what was found, or why not: one clause
};
DirectChoice direct_storage();

}  // namespace gpu
