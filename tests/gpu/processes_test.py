"""validate by several processes, each one rank with a device of its own: the same report as from ranks that are threads, and one failure for all.

SHARDKIT is the binary whose devices are emulated; NCCL's double, found beside it, works among processes."""
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "cli")]
from ranks_test import LAUNCHERS, environment, finish  # noqa: E402
from support import DATA, SHARDKIT, Case  # noqa: E402

NCCL = pathlib.Path(SHARDKIT).resolve().parent.parent / "fake_libs/libfake_nccl.so"
LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"
LLAMA_REFERENCE = DATA / "references/mcore_llama_untied_bf16.safetensors"
DEEPSEEK = next((DATA / "pairs/deepseek_v3_mtp_bf16").glob("tp*"))
DEEPSEEK_REFERENCE = DATA / "references/pairs_deepseek_v3_mtp_bf16.safetensors"
SAME = ("loss", "loss_true_vocab", "mtp", "activations", "weights", "findings", "bytes_read")


def start(args, rank=None, size=1, launcher="by hand", **more):
    variables = {"SHARDKIT_EMULATED_NCCL": NCCL, **more}
    variables |= LAUNCHERS[launcher](rank, size) if rank is not None else {"SHARDKIT_EMULATED_DEVICES": 8}
    return subprocess.Popen([SHARDKIT, "validate", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(variables))


def meetings(processes):
    """What the double keeps in shared memory while a group's ranks have not all come."""
    return [path for process in processes for path in pathlib.Path("/dev/shm").glob(f"fake_nccl_{process.pid}_*")]


def linked(process):
    """It has met a group: its memory stays mapped when all have come and its name is gone."""
    try:
        return "/fake_nccl_" in pathlib.Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


class Processes(Case):
    def here(self, checkpoint):
        """A copy whose folder the ranks may meet in."""
        out = self.tmp / checkpoint.parent.name
        if not out.exists():
            shutil.copytree(checkpoint, out)
        return out

    def layout(self, tp, pp):
        return ["--tp", tp, "--pp", pp, "--device", "cuda"]

    def together(self, args, size, **more):
        return finish([start(args, rank, size, **more) for rank in range(size)])

    def same(self, checkpoint, tp, pp, *args, **more):
        args = [self.here(checkpoint), *args, *self.layout(tp, pp), "--json"]
        (status, out, err), = finish([start(args)])
        self.assertEqual(status, 0, err)
        threads = json.loads(out)
        done = self.together(args, tp * pp, **more)
        self.assertEqual([x[0] for x in done], [0] * (tp * pp), done)
        self.assertEqual([x[1] for x in done[1:]], [""] * (tp * pp - 1))
        processes = json.loads(done[0][1])
        for report in (threads, processes):
            self.assertTrue(any("ranks talk by NCCL" in note for note in report["notes"]), report["notes"])
        for name in SAME:
            self.assertEqual(threads.get(name), processes.get(name), (checkpoint, tp, pp, name))
        return threads, processes

    def test_the_same_as_threads(self):
        for tp, pp in ((2, 1), (1, 2), (2, 2)):
            for compute in ("f32", "bf16", "fp8"):
                self.same(LLAMA, tp, pp, "--compute", compute)
        self.same(DATA / "hf/gpt2_tied_f32", 2, 2)      # a tied table on two stages
        self.same(DATA / "hf/gpt_oss_bf16", 2, 1)       # experts with biases, sinks

    def test_every_launcher(self):
        for launcher in LAUNCHERS:
            self.same(LLAMA, 2, 1, launcher=launcher)

    def test_references_and_other_checkpoints_are_judged_by_all(self):
        threads, processes = self.same(DEEPSEEK, 2, 2, "--reference", DEEPSEEK_REFERENCE)
        self.assertEqual([check["name"] for check in threads["checks"]], [check["name"] for check in processes["checks"]])
        self.assertGreater(len(processes["checks"]), 4)
        self.same(LLAMA, 2, 2, "--reference", LLAMA_REFERENCE)
        _, processes = self.same(LLAMA, 2, 2, "--against", DATA / "mcore/llama_untied_bf16/tp1pp1")
        self.assertIn("same bits", str(processes["checks"]))

    def test_found_wanting_by_all(self):
        done = self.together([self.here(LLAMA), *self.layout(2, 1), "--max-loss", "0.1"], 2)
        self.assertEqual([x[0] for x in done], [1, 1], done)
        self.assertIn("max loss", done[0][1])
        self.assertEqual(done[1][1:], ("", ""))

    def fails(self, done, status, *words):
        self.assertEqual([x[0] for x in done], [status] * len(done), done)
        for _, out, err in done:
            self.assertEqual(len(err.strip().splitlines()), 1, done)
            for word in words:
                self.assertIn(word, err)

    def test_refusals(self):
        here = self.here(LLAMA)
        self.fails(self.together([here, *self.layout(2, 2)], 2), 2, "--tp 2 --pp 2: are 4 ranks; WORLD_SIZE=2 processes were started")
        self.fails(self.together([here, "--tp", 2], 2), 2, "--device cpu: ranks are threads of one process there")
        processes = [start([here, *self.layout(2, 1), "--compute", compute], rank, 2) for rank, compute in enumerate(("f32", "bf16"))]
        self.fails(finish(processes), 6, "rank 1: would compute something else than rank 0")

    def test_a_rank_that_fails_while_loading_or_computing(self):
        here = self.here(LLAMA)
        for after in (0, 3, 40, 80):
            processes = [start([here, *self.layout(2, 2)], rank, 4, **({"SHARDKIT_EMULATED_LOST_AFTER": after} if rank == 2 else {})) for rank in range(4)]
            done = finish(processes)
            self.fails(done, 8, "device: lost")
            self.assertIn("rank 2: ", done[0][2])

    def test_a_checkpoint_that_is_damaged(self):
        here = self.here(DATA / "hf/llama_untied_bf16")
        weights = next(here.glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-4096:] = b"\xff" * 4096
        weights.write_bytes(content)
        args = [here, *self.layout(2, 2), "--json"]
        (status, out, _), = finish([start(args)])
        done = self.together(args, 4)
        self.assertEqual([x[0] for x in done], [status] * 4, done)
        self.assertEqual(status, 1)
        self.assertEqual(json.loads(done[0][1])["findings"], json.loads(out)["findings"])

    def test_a_checksum_of_what_several_ranks_read(self):
        """Each sums what it read; together they find what one process finds, and read no more."""
        here = self.here(LLAMA)
        file = max(here.rglob("*.distcp"), key=lambda one: one.stat().st_size)
        content = bytearray(file.read_bytes())
        records = [(content.index(b"PK\x07\x08", found.end()) - found.end(), found.end()) for found in re.finditer(rb"archive/data/0FB..Z*", content, re.DOTALL)]
        size, first = max(records)
        content[first + size // 2] ^= 1
        file.write_bytes(content)
        args = [here, *self.layout(2, 2)]
        (status, _, err), = finish([start(args)])
        self.assertEqual(status, 4, err)
        self.assertIn("CRC-32", err)
        done = self.together(args, 4)
        self.fails(done, 4, err.strip().removeprefix("shardkit: error: "))

    def test_a_rank_that_is_killed_ends_all(self):
        here = self.here(LLAMA)
        for victim in (3, 0):
            for late in (False, True):  # before links are made; while weights travel or after
                with self.subTest(victim=victim, late=late):
                    processes = [start([here, *self.layout(2, 2)], rank, 4, SHARDKIT_EMULATED_PAUSE_US=20000) for rank in range(4)]
                    until = time.monotonic() + 30
                    while not meetings(processes) and not any(map(linked, processes)) and time.monotonic() < until:
                        time.sleep(0.0002)
                    while late and not all(map(linked, processes)) and time.monotonic() < until:
                        time.sleep(0.001)
                    time.sleep(0.1 if late else 0)
                    processes[victim].send_signal(signal.SIGSTOP)
                    time.sleep(0.3)
                    processes[victim].kill()
                    done = finish(processes)
                    for left in meetings(processes):
                        left.unlink()
                    self.assertEqual(done.pop(victim)[0], -signal.SIGKILL, done)
                    self.fails(done, 7, f"rank {victim}: is gone")

    def test_a_signal_stops_all(self):
        here = self.here(LLAMA)
        processes = [start([here, *self.layout(2, 1)], rank, 2, SHARDKIT_EMULATED_PAUSE_US=20000) for rank in range(2)]
        until = time.monotonic() + 30
        while not all(map(linked, processes)) and time.monotonic() < until:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        done = finish(processes)
        self.assertEqual([x[0] for x in done], [7, 128 + signal.SIGTERM], done)
        self.assertIn("rank 1: stopped by a signal", done[0][2])


if __name__ == "__main__":
    if not NCCL.exists():
        print(f"skipped: {NCCL} was not built (nccl.h was not found)")
        sys.exit(77)
    unittest.main()
