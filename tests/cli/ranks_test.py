"""One conversion by several processes that find each other: same bytes as by one, and nothing published where one of them fails."""
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, files_below  # noqa: E402

LLAMA = DATA / "mcore/llama_untied_bf16"
LAUNCHERS = {
    "torchrun": lambda rank, size: {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "t"},
    "by hand": lambda rank, size: {"RANK": rank, "WORLD_SIZE": size},
    "open mpi": lambda rank, size: {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "OMPI_COMM_WORLD_LOCAL_SIZE": size},
    "mpich": lambda rank, size: {"PMI_RANK": rank, "PMI_SIZE": size},
    "srun": lambda rank, size: {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0},
}


def source():
    return next(x for x in sorted(LLAMA.iterdir()) if x.name.startswith("tp"))


def environment(more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "SLURM_", "SHARDKIT_"))}
    return clean | {"SHARDKIT_TIMEOUT": "20"} | {k: str(v) for k, v in more.items()}


def start(args, rank, size, launcher="by hand", more=None, limit=None):
    return subprocess.Popen([SHARDKIT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit,
                            env=environment(LAUNCHERS[launcher](rank, size) | (more or {})))


def finish(processes):
    out = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=60)
        out.append((process.returncode, stdout, stderr))
    return out


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def big_safetensors(folder, tensors=24, mib=8):
    """A plain checkpoint of many files' worth of bytes, so that a rank can be met while it writes."""
    folder.mkdir()
    size = mib << 20
    header = json.dumps({f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(tensors)}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for i in range(tensors):
            file.write(bytes([i]) * size)


class Ranks(Case):
    def together(self, args, size, **more):
        return finish([start(args, rank, size, **more) for rank in range(size)])

    def only(self, *names):
        self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), sorted(names))

    def test_same_bytes_as_one_process(self):
        for number, (to, size, launcher, more) in enumerate((("mp_rank", 2, "by hand", {}), ("torch_dist", 3, "torchrun", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}), ("hf", 4, "open mpi", {}),
                                                             ("mp_rank", 3, "mpich", {}), ("torch_dist", 2, "srun", {}), ("torch_dist", 4, "by hand", {"SHARDKIT_SECRET": "s", "SHARDKIT_MASTER": f"127.0.0.1:{free_port()}"}),
                                                             ("mp_rank", 2, "by hand", {"SHARDKIT_SECRET": "s", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}))):
            with self.subTest(to=to, size=size, launcher=launcher, more=more):
                one, several = self.tmp / f"one{number}", self.tmp / f"several{number}"
                shape = [] if to == "hf" else ["--tp", 4, "--pp", 2]
                flags = ["--to", to, *shape, *(["--max-shard-size", "20KB"] if to == "hf" else [])]
                self.ok("convert", source(), one, *flags, "-q")
                done = self.together(["convert", source(), several, *flags, "--json"], size, launcher=launcher, more=more)
                self.assertEqual([status for status, _, _ in done], [0] * size, done)
                self.assertEqual(files_below(one), files_below(several))
                told = json.loads(done[0][1])
                self.assertEqual(told["bytes_written"], json.loads(self.ok("convert", source(), self.tmp / f"again{number}", *flags, "--json"))["bytes_written"])
                self.assertEqual([out for _, out, _ in done[1:]], [""] * (size - 1))
                self.only(*(f"{x}{n}" for x in ("one", "several", "again") for n in range(number + 1)))

    def test_more_ranks_than_files_and_force(self):
        args = ["reshard", source(), self.tmp / "out", "--tp", 1, "--pp", 1, "-q"]
        self.assertEqual([x[0] for x in self.together(args, 4)], [0] * 4)
        first = files_below(self.tmp / "out")
        refused = self.together(args, 2)
        self.assertEqual([x[0] for x in refused], [2, 2])
        self.assertIn("exists; --force replaces it", refused[0][2])
        self.assertIn("rank 0: ", refused[1][2])
        self.assertEqual([x[0] for x in self.together([*args, "--force"], 3)], [0] * 3)
        self.assertEqual(files_below(self.tmp / "out"), first)
        self.only("out")

    def fails(self, done, status, *words):
        self.assertTrue(all(x[0] == status for x in done), done)
        for _, out, err in done:
            self.assertEqual(len(err.strip().splitlines()), 1, err)
            self.assertTrue(err.startswith("shardkit: error: "), err)
            for word in words:
                self.assertIn(word, err)

    def test_a_rank_that_cannot_write_fails_all(self):
        def little_room():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        args = ["convert", source(), self.tmp / "out", "--to", "torch_dist", "-q"]
        processes = [start(args, rank, 3, limit=little_room if rank == 1 else None) for rank in range(3)]
        done = finish(processes)
        self.fails(done, 7, "File too large")
        self.assertIn("rank 1: ", done[0][2])
        self.assertIn("rank 1: ", done[2][2])
        self.only()

    def test_a_rank_that_is_killed_fails_all(self):
        big_safetensors(self.tmp / "big")
        for victim in (1, 2, 0):  # rank 0 last: its folder stays until the next start
            with self.subTest(victim=victim):
                args = ["convert", self.tmp / "big", self.tmp / "out", "--to", "dcp", "--threads", 1]
                processes = [start(args, rank, 3) for rank in range(3)]
                until = time.monotonic() + 30
                while not list(self.tmp.glob(".out.shardkit-*")) and time.monotonic() < until:
                    time.sleep(0.0005)
                processes[victim].send_signal(signal.SIGSTOP)  # before it can have written 60 MB
                time.sleep(0.2)
                self.assertFalse((self.tmp / "out").exists())
                processes[victim].kill()
                done = finish(processes)
                self.assertEqual(done.pop(victim)[0], -signal.SIGKILL)
                self.fails(done, 7, f"rank {victim}: is gone")
                self.assertFalse((self.tmp / "out").exists())
                if victim != 0:
                    self.only("big")
        self.assertEqual([x[0] for x in self.together([*args, "--no-sync"], 2)], [0, 0])  # and what rank 0 left behind is cleared
        self.only("big", "out")

    def test_a_signal_stops_all(self):
        big_safetensors(self.tmp / "big")
        processes = [start(["convert", self.tmp / "big", self.tmp / "out", "--to", "dcp", "--threads", 1], rank, 2) for rank in range(2)]
        while not list(self.tmp.glob(".out.shardkit-*")):
            time.sleep(0.0005)
        processes[1].send_signal(signal.SIGTERM)
        done = finish(processes)
        self.assertEqual([x[0] for x in done], [7, 128 + signal.SIGTERM], done)
        self.assertIn("rank 1: stopped by a signal", done[0][2])
        self.only("big")

    def test_waiting_is_said_and_leaves_nothing_when_stopped(self):
        shutil.copytree(source(), self.tmp / "ckpt")
        for args, said in ((["validate", self.tmp / "ckpt", "--tp", 2], 1), (["convert", self.tmp / "ckpt", self.tmp / "out", "--to", "hf"], 1), (["validate", self.tmp / "ckpt", "--tp", 2, "-q"], 0)):
            process = start(args, 0, 2)
            if said:
                self.assertEqual(process.stderr.readline(), "shardkit: waiting for 1 of 2 ranks (rank 1), for at most 20 s; WORLD_SIZE=2 says how many there are (without it one process works alone)\n")
            else:
                time.sleep(2.5)
            self.assertTrue(list(self.tmp.glob(".*.ranks")))
            process.send_signal(signal.SIGTERM)
            self.assertEqual(finish([process])[0], (128 + signal.SIGTERM, "", "shardkit: error: stopped by signal 15; nothing is left under the final name\n"))
            self.only("ckpt")

    def test_wrong_secret_and_missing_ranks(self):
        args = ["convert", source(), self.tmp / "out", "--to", "torch_dist", "-q"]
        more = {"SHARDKIT_MASTER": f"127.0.0.1:{free_port()}", "SHARDKIT_TIMEOUT": "2"}
        done = finish([start(args, rank, 2, more=more | {"SHARDKIT_SECRET": word}) for rank, word in enumerate(("right", "wrong"))])
        self.fails(done, 7)
        self.assertIn("rank 1 did not come within 2 s; WORLD_SIZE=2 says how many there are (without it one process works alone); 1 connections without the secret were refused", done[0][2])
        self.assertIn("refused rank 1: is SHARDKIT_SECRET the same in every rank?", done[1][2])
        done = finish([start(args, rank, 3, more={"SHARDKIT_TIMEOUT": "1"}) for rank in (0, 1)])
        self.fails(done, 7, "rank 2 did not come within 1 s")
        done = finish([start(args, 1, 2, more={"SHARDKIT_TIMEOUT": "1"})])
        self.fails(done, 7, "rank 1 did not find rank 0 there within 1 s")
        self.fails(finish([start(args, 2, 2)]), 2, "RANK=2")
        self.fails(finish([start(args, 0, 2, more={"SHARDKIT_MASTER": "127.0.0.1:1"})]), 2, "needs SHARDKIT_SECRET")
        self.fails(finish([start(args, 0, 2, more={"SHARDKIT_TIMEOUT": "soon"})]), 2, "SHARDKIT_TIMEOUT=soon")
        self.only()

    def test_ranks_that_would_do_different_things_do_nothing(self):
        processes = [start(["convert", source(), self.tmp / "out", "--to", "torch_dist", "--tp", tp, "-q"], rank, 2) for rank, tp in enumerate((1, 2))]
        self.fails(finish(processes), 6, "rank 1: would do something else than rank 0")
        self.only()

    def test_what_one_process_must_write(self):
        self.fails(self.together(["convert", DATA / "hf/llama_untied_bf16", self.tmp / "out.h5", "--to", "hdf5"], 2), 2, "hdf5: one process writes it")
        self.only()

    def test_a_lone_rank_and_parts_do_not_wait(self):
        self.assertEqual(finish([start(["convert", source(), self.tmp / "a", "--to", "torch_dist", "-q"], 0, 1)])[0][0], 0)
        self.assertEqual(finish([start(["convert", source(), self.tmp / "b", "--to", "torch_dist", "-q", "--part", "1/1"], 1, 2)])[0][0], 0)
        self.assertEqual(files_below(self.tmp / "a"), files_below(self.tmp / "b"))


if __name__ == "__main__":
    unittest.main()
