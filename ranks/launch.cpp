// A table of the launchers' variables.
#include "ranks/launch.h"

#include "libshard/error.h"

#include <charconv>

namespace ranks {
namespace {

struct Words {
  const char *rank, *size, *local_rank, *local_size;
  const char* jobs[3];                // whichever are set, together
};
constexpr Words kLaunchers[] = {
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", ""}},
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", ""}},
    {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", {"HYDRA_JOB_ID", "PMI_JOBID", ""}},
    {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", {"SLURM_JOB_ID", "SLURM_STEP_ID", ""}},
};

constexpr int kMostRanks = 65'536;

std::string value(const Environment& environment, const char* name) {
  const auto found = environment.find(name);
  return found == environment.end() ? "" : found->second;
}

int number(const Environment& environment, const char* name, int least, int most) {
  const auto text = value(environment, name);
  int out = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  shard::require(error == std::errc() && end == text.data() + text.size() && out >= least && out <= most, shard::Code::Usage,
                 [&] { return fmt::format("{}={}: should be a number from {} to {}", name, text, least, most); });
  return out;
}

}  // namespace

std::optional<Launch> launch_of(const Environment& environment) {
  for (const auto& words : kLaunchers) {
    if (value(environment, words.size).empty() || value(environment, words.rank).empty()) continue;
    Launch out;
    out.size = number(environment, words.size, 1, kMostRanks);
    out.rank = number(environment, words.rank, 0, out.size - 1);
    out.from = words.size;
    if (out.size == 1) return std::nullopt;
    if (!value(environment, words.local_size).empty()) out.local_size = number(environment, words.local_size, 1, out.size);
    if (!value(environment, words.local_rank).empty()) out.local_rank = number(environment, words.local_rank, 0, out.local_size.value_or(out.size) - 1);
    for (const auto* job : words.jobs)
      if (const auto text = value(environment, job); !text.empty()) out.job += (out.job.empty() ? "" : ".") + text;
    return out;
  }
  return std::nullopt;
}

}  // namespace ranks
