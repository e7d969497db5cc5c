// Loading the doubles of tests/gpu/emulated/fake_libs in the vendors' place.
#pragma once

#include "gpu/kernel.h"
#include "tests/gpu/emulated/fake_libs/fake.h"

#include <doctest/doctest.h>
#include <dlfcn.h>

#include <string>

#ifdef SHARDKIT_FAKE_LIBS  // where the vendors' headers were found

namespace doubles {

/// The double's file, able to work in the emulated device's streams.
inline std::string path_of(const char* name) {
  const auto path = std::string(SHARDKIT_FAKE_LIBS) + "/" + name;
  void* const library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  REQUIRE_MESSAGE(library, path);
  auto* const enqueue = static_cast<FakeEnqueue*>(::dlsym(library, "fake_enqueue"));
  REQUIRE(enqueue);
  *enqueue = [](void* stream, std::function<void()> work) { gpu::enqueue({stream}, std::move(work)); };
  auto* const wait = static_cast<FakeWait*>(::dlsym(library, "fake_wait"));
  REQUIRE(wait);
  *wait = gpu::let_others_work;
  return path;
}

template <typename T>
T& variable(const std::string& path, const char* name) {
  void* const found = ::dlsym(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), name);
  REQUIRE(found);
  return *static_cast<T*>(found);
}

}  // namespace doubles

#endif
