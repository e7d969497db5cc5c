// The container of torch.save before 1.6: pickles one after the other, then the storages. Refuses big-endian
// ones.
#pragma once

#include "formats/torch_save.h"
#include "formats/zip.h"

namespace formats {

/// The stream that fills `part`; its storages become records "data/KEY".
TorchFile read_legacy(Windows& part);

}  // namespace formats
