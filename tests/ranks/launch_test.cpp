// What launchers leave in the environment, and where ranks meet.
#include "ranks/launch.h"
#include "ranks/rendezvous.h"

#include <doctest/doctest.h>

using ranks::launch_of;

TEST_CASE("a process knows its rank under each launcher") {
  CHECK(!launch_of({}));
  CHECK(!launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}));
  CHECK(!launch_of({{"PMIX_RANK", "1"}}));
  CHECK(!launch_of({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "7"}}));  // a batch script is no step

  const auto torch = launch_of({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"TORCHELASTIC_RUN_ID", "abc"}, {"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "2"}});
  REQUIRE(torch);
  CHECK(torch->rank == 5);
  CHECK(torch->size == 8);
  CHECK(torch->local_rank == 1);
  CHECK(torch->local_size == 4);
  CHECK(torch->job == "abc");
  CHECK(torch->from == "WORLD_SIZE");

  const auto open_mpi = launch_of({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"PMIX_NAMESPACE", "prterun-1"}, {"PMIX_RANK", "1"}});
  REQUIRE(open_mpi);
  CHECK(open_mpi->rank == 1);
  CHECK(open_mpi->local_size == 2);
  CHECK(open_mpi->job == "prterun-1");

  const auto mpich = launch_of({{"PMI_RANK", "2"}, {"PMI_SIZE", "3"}, {"MPI_LOCALRANKID", "0"}});
  REQUIRE(mpich);
  CHECK(mpich->rank == 2);
  CHECK(mpich->local_rank == 0);
  CHECK(!mpich->local_size);

  const auto srun = launch_of({{"SLURM_PROCID", "3"}, {"SLURM_NTASKS", "16"}, {"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "7"}, {"SLURM_STEP_ID", "2"}});
  REQUIRE(srun);
  CHECK(srun->rank == 3);
  CHECK(srun->size == 4);
  CHECK(srun->local_rank == 1);
  CHECK(srun->job == "7.2");
}

TEST_CASE("variables that contradict themselves are refused by name") {
  CHECK_THROWS_WITH(launch_of({{"RANK", "4"}, {"WORLD_SIZE", "4"}}), "RANK=4: should be a number from 0 to 3");
  CHECK_THROWS_WITH(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "many"}}), "WORLD_SIZE=many: should be a number from 1 to 65536");
  CHECK_THROWS_WITH(launch_of({{"PMI_RANK", "-1"}, {"PMI_SIZE", "4"}}), "PMI_RANK=-1: should be a number from 0 to 3");
  CHECK_THROWS_WITH(launch_of({{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "2"}, {"LOCAL_WORLD_SIZE", "2"}}), "LOCAL_RANK=2: should be a number from 0 to 1");
}

TEST_CASE("ranks meet at an address that comes with a secret, else by a file") {
  const ranks::Launch launch{1, 2, 0, {}, "7.2/x", "WORLD_SIZE"};
  const auto by_file = ranks::place_of({{"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}}, launch, "/data/out/");
  CHECK(by_file.host.empty());
  CHECK(by_file.file == "/data/.out.ranks7.2_x");
  const auto torch = ranks::place_of({{"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}, {"SHARDKIT_SECRET", "s"}}, launch, "/data/out");
  CHECK(torch.host == "host");
  CHECK(torch.port == "29500");
  CHECK(torch.secret == "s");
  CHECK(ranks::place_of({{"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}, {"SHARDKIT_SECRET", "s"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}, launch, "/data/out").host.empty());
  const auto ours = ranks::place_of({{"SHARDKIT_MASTER", "[::1]:9"}, {"SHARDKIT_SECRET", "s"}, {"MASTER_ADDR", "host"}, {"MASTER_PORT", "29500"}}, launch, "/data/out");
  CHECK(ours.host == "::1");
  CHECK(ours.port == "9");
  CHECK_THROWS_WITH(ranks::place_of({{"SHARDKIT_MASTER", "host:9"}}, launch, "/x"), "SHARDKIT_MASTER: needs SHARDKIT_SECRET, the same word in every rank");
  CHECK_THROWS_WITH(ranks::place_of({{"SHARDKIT_MASTER", "host"}, {"SHARDKIT_SECRET", "s"}}, launch, "/x"), "SHARDKIT_MASTER=host: should be HOST:PORT");
}
