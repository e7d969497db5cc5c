// Shared libraries that are loaded when a device is asked for, not with the program: it starts on machines that have none of them.
// gpu/libs holds one file for each that is used this way:
//   cublaslt.h  products             libcublasLt.so.13, .12
//   cudnn.h     `fused` attention    libcudnn.so.9
//   nccl.h      ranks                libnccl.so.2
// Each resolves the functions it calls into a table typed by the vendor's header, asks the version, and refuses what is absent or too old
// as Error{Device} with the reason. Where the header was missing when the program was built, that is the reason. No vendor header is
// included by these headers. Every constructor takes a path that replaces the usual names: how tests put a double in the library's place.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace gpu {

class Library {
 public:
  /// The first of `names` (sonames or paths, as dlopen takes them) that loads; a `path` that is not "" is the only one tried. Never unloaded.
  /// Throws Error{Device}: `what`, the names that were tried and what the loader said.
  Library(std::string what, const std::string& path, std::initializer_list<const char*> names);

  /// The entry point of that name, as the type of `into`. Throws Error{Device} where the library has none.
  template <typename F>
  void resolve(F*& into, const char* name) const {
    into = reinterpret_cast<F*>(symbol(name));
  }
  /// "cuBLASLt (libcublasLt.so.13)": what error lines begin with.
  const std::string& title() const { return title_; }

 private:
  void* symbol(const char* name) const;
  std::string title_;
  void* handle_ = nullptr;
};

}  // namespace gpu
