// Where ranks meet: an address from the environment, or a file.
#include "ranks/rendezvous.h"

namespace ranks {

Place place_of(const Environment& environment, const Launch& launch, const std::filesystem::path& near) {
  const auto value = [&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? "" : found->second;
  };
  const auto secret = value("SHARDKIT_SECRET"), master = value("SHARDKIT_MASTER");
  shard::require(secret.size() <= 256, shard::Code::Usage, [] { return "SHARDKIT_SECRET: is longer than 256 bytes"; });
  if (!master.empty()) {
    const auto colon = master.rfind(':');
    shard::require(colon != master.npos && colon > 0 && colon + 1 < master.size(), shard::Code::Usage, [&] { return fmt::format("SHARDKIT_MASTER={}: should be HOST:PORT", master); });
    shard::require(!secret.empty(), shard::Code::Usage, [] { return "SHARDKIT_MASTER: needs SHARDKIT_SECRET, the same word in every rank"; });
    auto host = master.substr(0, colon);
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    return {host, master.substr(colon + 1), secret, {}};
  }
  if (!secret.empty() && !value("MASTER_ADDR").empty() && !value("MASTER_PORT").empty() && value("TORCHELASTIC_USE_AGENT_STORE") != "True")
    return {value("MASTER_ADDR"), value("MASTER_PORT"), secret, {}};
  auto beside = std::filesystem::absolute(near).lexically_normal();
  if (beside.filename().empty()) beside = beside.parent_path();
  std::string name = fmt::format(".{}.ranks", beside.filename().string());
  for (const char c : launch.job.substr(0, 100)) name += std::string_view("/\0", 2).find(c) == std::string_view::npos ? c : '_';
  return {"", "", secret, beside.parent_path() / name};
}

}  // namespace ranks
