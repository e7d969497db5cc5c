// Where the vendors' libraries are: on a device themselves, by their usual names; on an emulated one their doubles.
#pragma once

#ifdef SHARDKIT_ON_DEVICE
#define SHARDKIT_LIBRARIES
#include <string>
namespace libraries {
inline std::string cublaslt() { return ""; }
inline std::string nccl() { return ""; }
}  // namespace libraries
#else
#include "tests/gpu/emulated/doubles.h"
#ifdef SHARDKIT_FAKE_LIBS
#define SHARDKIT_LIBRARIES
namespace libraries {
inline std::string cublaslt() { return doubles::path_of("libfake_cublaslt.so"); }
inline std::string nccl() { return doubles::path_of("libfake_nccl.so"); }
}  // namespace libraries
#endif
#endif
