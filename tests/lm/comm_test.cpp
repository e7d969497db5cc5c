// Ranks as threads: collectives agree, errors end everybody.
#include "lm/comm.h"

#include "lm/attention_backend.h"
#include "lm/language_module.h"
#include "libshard/error.h"

#include <doctest/doctest.h>

#include <atomic>

using namespace lm;

TEST_CASE("sums and maxima reach every rank, again and again") {
  Group group(4);
  std::atomic<int> wrong = 0;
  run_ranks(4, [&] { group.fail(); }, [&](int rank) {
    LocalComm comm(group, rank);
    for (int round = 0; round < 50; ++round) {
      float values[2] = {static_cast<float>(rank + round), static_cast<float>(-rank)};
      comm.all_reduce_sum(values);
      if (values[0] != static_cast<float>(6 + 4 * round) || values[1] != -6) ++wrong;
      float top[1] = {static_cast<float>(rank)};
      comm.all_reduce_max(top);
      if (top[0] != 3) ++wrong;
    }
  });
  CHECK(wrong == 0);
}

TEST_CASE("messages arrive in order") {
  Group group(2);
  std::vector<float> got;
  run_ranks(2, [&] { group.fail(); }, [&](int rank) {
    LocalComm comm(group, rank);
    for (int i = 0; i < 3; ++i) {
      if (rank == 0) {
        Tensor one(1, 1);
        one.row(0)[0] = static_cast<float>(i);
        comm.send(1, std::move(one));
      } else {
        Tensor one(1, 1);
        comm.receive(0, one);
        got.push_back(one.row(0)[0]);
      }
    }
  });
  CHECK(got == std::vector<float>{0, 1, 2});
}

TEST_CASE("a rank that fails wakes those that wait for it, and its error is the one thrown") {
  Group group(3);
  CHECK_THROWS_WITH_AS(run_ranks(3, [&] { group.fail(); },
                                 [&](int rank) {
                                   LocalComm comm(group, rank);
                                   if (rank == 1) shard::fail(shard::Code::Mismatch, "rank one: is broken");
                                   float value[1] = {1};
                                   if (rank == 0) comm.all_reduce_sum(value);
                                   Tensor nothing;
                                   if (rank == 2) comm.receive(0, nothing);
                                 }),
                       "rank one: is broken", shard::Error);
}

TEST_CASE("the attention backend's environment") {
  const auto flash = attention_backend_environment(AttentionBackend::Flash, 3, {});
  CHECK(flash == Environment{{"NVTE_FLASH_ATTN", "1"}, {"NVTE_FUSED_ATTN", "0"}, {"NVTE_UNFUSED_ATTN", "0"}, {"NVTE_FLASH_ATTN_V2", "0"}, {"NVTE_FLASH_ATTN_V4", "0"}});
  CHECK(attention_backend_environment(AttentionBackend::Auto, std::nullopt, {{"NVTE_FUSED_ATTN", "1"}}).size() == 3);
  CHECK_THROWS_AS(attention_backend_environment(AttentionBackend::Local, std::nullopt, {{"NVTE_FLASH_ATTN", "1"}}), shard::Error);
}

TEST_CASE("stages, embedding ranks and rolled rows") {
  shard::TransformerConfig config;
  config.num_layers = 5;
  config.tied = true;
  config.mtp_num_layers = 1;
  const auto first = placement_of(config, 0, 2), last = placement_of(config, 1, 2);
  CHECK((first.pre_process && !first.post_process && !first.mtp_process && first.layers == 2));
  CHECK((!last.pre_process && last.post_process && last.mtp_process && last.first_layer == 2 && last.layers == 3));
  CHECK(embedding_ranks(config, 2) == std::vector<int>{0, 1});
  CHECK(embedding_ranks(config, 1) == std::vector<int>{0});
  CHECK_THROWS_AS(placement_of(config, 0, 6), shard::Error);
  CHECK(roll_left({1, 2, 3, 4, 5, 6}, 3) == std::vector<Index>{2, 3, 0, 5, 6, 0});
}
