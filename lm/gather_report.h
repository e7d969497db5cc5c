// Ranks that are processes: what each found in its part of a pass becomes the same whole report in all of them.
#pragma once

#include "lm/model_run.h"

namespace lm {

/// Throws Mismatch in every rank unless all are about to compute the same of the same model: `plans` and what the request feeds it.
void agree(Processes& processes, const Ranks& ranks, const std::vector<StagePlan>& plans, const ForwardRequest& request);

/// `report.result` and `source` hold this rank's part, and afterwards, as findings and stats, everyone's. Rank 0 reads what no rank has summed.
void gather_report(Processes& processes, const Ranks& ranks, WeightSource& source, const shard::Budget& budget, RunReport& report);

}  // namespace lm
