// dlopen, and what it said.
#include "gpu/libs/library.h"

#include "libshard/error.h"

#include <dlfcn.h>

namespace gpu {
namespace {

/// dlerror's words without the path they begin with, if they do.
std::string loader_said(const std::string& name) {
  const char* text = ::dlerror();
  std::string out = text ? text : "the loader gave no reason";
  if (out.starts_with(name + ": ")) out.erase(0, name.size() + 2);
  return out;
}

}  // namespace

Library::Library(std::string what, const std::string& path, std::initializer_list<const char*> names) {
  std::string tried;
  const auto load = [&](const std::string& name) {
    handle_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_) title_ = fmt::format("{} ({})", what, name);
    else tried += fmt::format("{}{} ({})", tried.empty() ? "" : ", ", name, loader_said(name));
    return handle_ != nullptr;
  };
  if (!path.empty()) load(path);
  else
    for (const auto* name : names)
      if (load(name)) break;
  shard::require(handle_ != nullptr, shard::Code::Device, [&] { return fmt::format("{}: could not be loaded: {}", what, tried); });
}

void* Library::symbol(const char* name) const {
  void* const found = ::dlsym(handle_, name);
  shard::require(found != nullptr, shard::Code::Device, [&] { return fmt::format("{}: has no {}; too old?", title_, name); });
  return found;
}

}  // namespace gpu
