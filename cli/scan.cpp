// shardkit scan: what pickles would import. Nothing is ever imported.
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/print.h"
#include "formats/pickle.h"
#include "formats/zip.h"
#include "libshard/error.h"

namespace cli {
namespace {

struct ScanAsk {
  std::vector<std::string> files;
  RunOptions run;
};

constexpr std::uint64_t kMostBytes = 2ull << 30;

const char* text_of(formats::pickle::Verdict verdict) {
  switch (verdict) {
    case formats::pickle::Verdict::Build: return "build";
    case formats::pickle::Verdict::Record: return "record";
    case formats::pickle::Verdict::Refuse: return "refuse";
  }
  return "refuse";
}

/// The names in the pickle (or, in a zip archive, in every *.pkl) of a file.
std::vector<formats::pickle::Name> names_in(const std::string& path) {
  const formats::File file(path);
  std::vector<formats::pickle::Name> out;
  const auto add = [&](std::uint64_t offset, std::uint64_t size) {
    shard::require(size <= kMostBytes, shard::Code::BadFormat, [&] { return fmt::format("{}: a pickle of {} bytes is beyond reason", path, size); });
    const auto text = file.text(offset, size);
    for (auto& name : formats::pickle::scan(std::as_bytes(std::span(text.data(), text.size())))) out.push_back(std::move(name));
  };
  try {
    if (file.size() >= 4 && file.text(0, 2) == "PK") {
      for (const auto& record : formats::read_zip(file, 0, file.size()).records)
        if (record.name.ends_with(".pkl")) add(record.offset, record.size);
    } else {
      add(0, std::min(file.size(), kMostBytes));
    }
  } catch (const shard::Error& error) {
    throw std::string(error.what()).starts_with(path) ? error : error.within(path);
  }
  return out;
}

int run_scan(const ScanAsk& ask) {
  bool refused = false;
  auto files = Json::array();
  for (const auto& path : ask.files) {
    const auto names = names_in(path);
    auto list = Json::array();
    for (const auto& name : names) {
      refused |= name.verdict == formats::pickle::Verdict::Refuse;
      list.push_back({{"module", name.module}, {"name", name.name}, {"verdict", text_of(name.verdict)}});
      if (!ask.run.json && !ask.run.quiet) print_line(fmt::format("{:6}  {}.{}  {}", text_of(name.verdict), name.module, name.name, ask.files.size() > 1 ? path : ""));
    }
    files.push_back({{"file", path}, {"names", list}});
  }
  if (ask.run.json) print_json({{"ok", !refused}, {"files", files}});
  return refused ? 1 : 0;
}

}  // namespace

void add_scan(CLI::App& app, Action& action) {
  auto ask = std::make_shared<ScanAsk>();
  auto* command = app.add_subcommand("scan", "What a pickle would import; never runs it");
  command->add_option("FILE", ask->files, "Torch files or pickles")->required();
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run_scan(*ask); }; });
}

}  // namespace cli
