// shardkit families: the model families it knows, and one of them as the JSON that a new one can start from.
#include "cli/commands.h"
#include "cli/print.h"
#include "formats/hf/family.h"

#include <fmt/format.h>

namespace cli {
namespace {

int run_families(const std::string& name, bool json) {
  if (!name.empty()) {
    const auto family = formats::hf::family_named(name);
    if (json) {
      fmt::print("{}\n", family.json.dump(2));
      return 0;
    }
    fmt::print("{}: {}\n", family.name, family.about);
    std::vector<std::vector<std::string>> rows{{"KEY", "STORED AS", "HOLDS"}};
    for (const auto& row : family.rows) {
      std::string holds;
      for (const auto& part : row.parts) holds += (holds.empty() ? "" : ", ") + part.name;
      rows.push_back({row.key, (row.stacked ? "experts | " : "") + row.dims, holds});
    }
    print_table(rows);
    return 0;
  }
  if (json) {
    auto list = Json::array();
    for (const auto& family : formats::hf::families()) list.push_back({{"family", family.name}, {"model_types", family.model_types}, {"architecture", family.architecture}, {"about", family.about}});
    print_json({{"families", list}});
    return 0;
  }
  std::vector<std::vector<std::string>> rows{{"FAMILY", "ARCHITECTURE", "WHAT IT IS"}};
  for (const auto& family : formats::hf::families()) rows.push_back({family.name, family.architecture, family.about});
  print_table(rows);
  return 0;
}

}  // namespace

void add_families(CLI::App& app, Action& action) {
  struct FamiliesAsk {
    std::string name;
    bool json = false;
  };
  auto ask = std::make_shared<FamiliesAsk>();
  auto* command = app.add_subcommand("families", "The model families it knows");
  command->add_option("NAME", ask->name, "A family, or a .json file of one");
  command->add_flag("--json", ask->json, "As JSON: one family is an example to start from");
  command->callback([ask, &action] { action = [ask] { return run_families(ask->name, ask->json); }; });
}

}  // namespace cli
