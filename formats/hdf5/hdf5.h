// HDF5 checkpoints: any file of data sets is read; ours keep groups by key, chunks, zstd and checksums.
#pragma once

#include "formats/target.h"

namespace formats::hdf5 {

/// An .h5 file, or a folder that holds model.h5.
bool matches(const std::filesystem::path& path);

/// Every data set of numbers is a tensor: its key is the attribute `name`, else its path with dots. Throws BadFormat.
Checkpoint open(const std::filesystem::path& path, const OpenOptions& options);

/// A folder with model.h5 and, of a Hugging Face source, its small files. Throws as the other targets do.
void create(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

}  // namespace formats::hdf5
