// What the ranks tell each other: the folder, a fingerprint of the plan, and at the end sums and counts.
#include "cli/crew.h"

#include "formats/json.h"
#include "libshard/error.h"

namespace cli {
namespace {

using shard::Code;

}  // namespace

Crew::Crew(const ranks::Launch& launch, const std::filesystem::path& target, bool force, bool quiet) : target_(target), force_(force), ranks_(launch, target, quiet) {}

const std::filesystem::path& Crew::folder() {
  if (!folder_.empty()) return folder_;
  if (ranks_.rank() == 0) folder_ = staging_.emplace(target_, force_).staging();
  return folder_ = ranks_.broadcast(folder_.string());
}

void Crew::agree(Fingerprint mine, const shard::Plan& whole, formats::LocalWriter& writer) {
  mine.source.erase("times");  // hosts may have copies of the source
  const auto all = ranks_.all_gather(digest_of(mine.whole() + fingerprint(whole, writer.describe(), writer.folder().names())));
  for (std::size_t r = 1; r < all.size(); ++r)
    shard::require(all[r] == all[0], Code::Mismatch, [&] { return fmt::format("rank {}: would do something else than rank 0; arguments or sources differ", r); });
}

bool Crew::finish(shard::Report& report, formats::LocalWriter& writer, bool sync) {
  writer.folder().flush(sync);
  nlohmann::json mine{{"sums", sums_of(report)}, {"read", report.bytes_read}, {"written", report.bytes_written}, {"in_kernel", report.bytes_copied_in_kernel}, {"through_device", report.bytes_through_device}};
  const auto all = ranks_.all_gather(mine.dump());
  if (ranks_.rank() == 0) {
    std::vector<nlohmann::json> sums;
    report.bytes_read = report.bytes_written = report.bytes_copied_in_kernel = report.bytes_through_device = 0;
    for (std::size_t r = 0; r < all.size(); ++r) {
      auto one = formats::parse_json(all[r], fmt::format("rank {}", r));
      report.bytes_read += one.at("read").get<std::uint64_t>();
      report.bytes_written += one.at("written").get<std::uint64_t>();
      report.bytes_copied_in_kernel += one.at("in_kernel").get<std::uint64_t>();
      report.bytes_through_device += one.at("through_device").get<std::uint64_t>();
      sums.push_back(std::move(one.at("sums")));
    }
    writer.commit(join_sums(sums, report, writer), false);
    staging_->commit(sync);
  }
  ranks_.finish();
  return ranks_.rank() == 0;
}

}  // namespace cli
