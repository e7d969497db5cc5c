// --device: where a command works, decided once and with the reason.
#pragma once

#include <string>
#include <vector>

namespace cli {

struct Device {
  std::vector<int> cuda;    ///< indices; none: the CPU
  std::string name;         ///< "cpu", "cuda:0", "cuda:0, cuda:1"
  std::string model;        ///< "NVIDIA H100 80GB HBM3"; "" of the CPU
  std::string why;          ///< "asked for", "auto: no NVIDIA driver was found"
};

/// "cpu", "cuda" (all devices that this build runs on), "cuda:N" or "auto", which takes the first of them, else the CPU. The driver is only
/// loaded where a device may be meant. Throws Usage for other words and Device where the asked-for one is not to be had.
Device choose_device(const std::string& text);

/// For commands that no device runs: throws Device for "cuda"; "auto" is the CPU.
void require_cpu(const std::string& text);

}  // namespace cli
