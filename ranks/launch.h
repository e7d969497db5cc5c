// One process of several that mpirun, srun, torchrun or a script started, as the environment says.
#pragma once

#include <map>
#include <optional>
#include <string>

namespace ranks {

using Environment = std::map<std::string, std::string>;

struct Launch {
  int rank = 0, size = 1;
  int local_rank = 0;                 ///< among those of its host: which device is its own
  std::optional<int> local_size;      ///< where the launcher tells
  std::string job;                    ///< the launcher's name for this start, "" where it has none: equal in all ranks, different from other starts'
  std::string from;                   ///< "WORLD_SIZE": the variable that said so
};

/// Asked in this order: RANK and WORLD_SIZE (torchrun, or by hand), Open MPI's variables, MPICH's and Intel's, those of an srun step. (A batch script's own
/// SLURM_NTASKS is no step.) Nothing where none is set or the size is 1. Throws Usage where they contradict themselves.
std::optional<Launch> launch_of(const Environment& environment);

}  // namespace ranks
