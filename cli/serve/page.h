// The history as people and scripts see it.
#pragma once

#include "cli/print.h"
#include "cli/serve/history.h"

#include <string>
#include <vector>

namespace cli {

/// {"id","checkpoint","origin","state","status","started","seconds","loss","error"[,"answer"]}
Json record_json(const Record& record, bool answer);

/// One self-contained HTML page, newest first, with a chart of the loss of each run's checkpoints. Everything that came from
/// outside is escaped.
std::string history_page(const std::vector<Record>& records, const std::string& root, std::size_t queued, bool running);

}  // namespace cli
