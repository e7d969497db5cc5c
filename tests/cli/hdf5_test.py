"""HDF5 there and back, for Megatron and Hugging Face sources; damaged files."""
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, digest, files_below, run, run_json  # noqa: E402


class Hdf5(Case):
    def test_there_and_back(self):
        sources = [*(DATA / "hf").iterdir(), *(next(f.iterdir()) for f in (DATA / "pairs").iterdir()), DATA / "legacy/llama_untied_bf16/tp2pp2"]
        for number, source in enumerate(sources):
            with self.subTest(source.name):
                held, back = self.tmp / f"{number}.h5", self.tmp / f"{number}.back"
                self.ok("convert", source, held, "--to", "hdf5", "-q")
                self.assertEqual(digest(source), digest(held))
                self.assertEqual(digest(source), digest(held / "model.h5"))
                self.ok("verify", held, "-q")
                self.ok("diff", source, held, "-q")
                self.ok("convert", held, back, "--to", "hf", "-q")
                self.assertEqual(digest(source), digest(back))
                self.ok("convert", held, self.tmp / f"{number}.dist", "--to", "torch_dist", "-q")
                self.assertEqual(digest(source), digest(self.tmp / f"{number}.dist"))

    def test_same_bytes_for_any_thread_count(self):
        source = DATA / "hf/gpt_oss_bf16"
        tensors = []
        for threads in (1, 5):
            out = self.tmp / str(threads)
            self.ok("convert", source, out, "--to", "hdf5", "--threads", threads, "-q")
            tensors.append(digest(out))
        self.assertEqual(*tensors)

    def test_memory_does_not_grow_with_the_model(self):
        """Most of what is resident is the program; a chunk that was written is let go."""
        source, out = self.tmp / "big", self.tmp / "h5"
        source.mkdir()
        tensors, size = 24, 4 << 20
        header = json.dumps({f"t{i}": {"dtype": "BF16", "shape": [2048, 1024], "data_offsets": [i * size, (i + 1) * size]} for i in range(tensors)}).encode()
        with open(source / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for i in range(tensors):
                file.write(random.Random(i).randbytes(size))
        child = subprocess.Popen([SHARDKIT, "convert", source, out, "--to", "hdf5", "--threads", "2", "--no-sync", "-q"])
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        self.assertEqual(status, 0)
        self.assertLess(usage.ru_maxrss, 64 << 10)  # KiB; the model has 96 MiB
        self.assertEqual(digest(source), digest(out))

    def test_inspect(self):
        out = self.tmp / "x"
        self.ok("convert", DATA / "hf/llama_untied_bf16", out, "--to", "hdf5", "-q")
        status, found = run_json("inspect", out)
        self.assertEqual((status, found["format"], found["family"]), (0, "hdf5", "llama"))

    def test_damage_is_found(self):
        out = self.tmp / "x"
        self.ok("convert", DATA / "hf/llama_untied_bf16", out, "--to", "hdf5", "-q")
        file = out / "model.h5"
        whole = file.read_bytes()
        before = files_below(out)
        refused = 0
        for at in range(2000, len(whole) - 100, len(whole) // 40):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
            status, _, err = run("hash", out, "-q")
            self.assertIn(status, (0, 4, 6), err)
            refused += status != 0
            if status == 4 and "chunk" in err:
                found = run_json("verify", out)
                self.assertEqual((found[0], {f["rule"] for f in found[1]["findings"] if f["severity"] == "error"}), (1, {"checksum"}))
        self.assertGreater(refused, 25)  # chunk checksums; some bytes belong to nothing
        for size in (0, 7, 8, 600, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            self.refused(4, "hash", out)
        file.write_bytes(whole)
        self.assertEqual(before, files_below(out))

    def test_damaged_attributes_are_refused(self):
        """Texts of any length lie in heaps that the library reads without looking where they end."""
        out = self.tmp / "x"
        self.ok("convert", DATA / "hf/llama_untied_bf16", out, "--to", "hdf5", "-q")
        file = out / "model.h5"
        whole = file.read_bytes()
        before = digest(out)
        at, heaps = whole.find(b"GCOL"), []
        while at >= 0:
            heaps.append(at)
            at = whole.find(b"GCOL", at + 4)
        self.assertTrue(heaps)
        for heap in heaps[:2]:
            for offset, bits in [(0, 1), (4, 2), (8, 0x40), (14, 1), (16, 1), (17, 0x80), (24, 1), (24, 0x80), (25, 0x40), (27, 0x7f), (30, 1), (31, 0x80), (48, 3), (56, 0xff)]:
                with self.subTest(heap=heap, offset=offset):
                    at = heap + offset
                    file.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
                    status, said, err = run("hash", "-q", out)
                    self.assertIn(status, (0, 4), err)
                    if status == 0:
                        self.assertEqual(said.split()[0], before)
        for name in (b"torch_dtype", b"bfloat16"):  # what a tensor is must not be lost with a bit
            at = whole.find(name)
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            status, _, err = run("verify", out)
            self.assertIn(status, (1, 4), err)

    def test_no_room(self):
        import resource
        import signal
        source = self.tmp / "src"
        source.mkdir()
        head = b'{"a":{"dtype":"U8","shape":[8,1000000],"data_offsets":[0,8000000]}}'
        (source / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + os.urandom(8_000_000))
        for size in (1000, 100_000, 3_000_000):
            self.refused(7, "convert", source, self.tmp / "out", "--to", "hdf5", "-q", "--threads", 4, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},  # the library's own, who cannot close
                         preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))
            self.assertEqual([p.name for p in self.tmp.iterdir()], ["src"])

    def test_a_receipt(self):
        for name in ("hf/llama_untied_bf16", "legacy/llama_untied_bf16/tp2pp2"):
            out, report = self.tmp / name[:2], self.tmp / f"{name[:2]}.json"
            self.ok("convert", DATA / name, out, "--to", "hdf5", "-q", "--report", report)
            self.ok("verify", out, "--receipt", report)

    def test_parts_are_refused(self):
        self.refused(2, "convert", DATA / "hf/llama_untied_bf16", self.tmp / "x", "--to", "hdf5", "--part", "1/2")


if __name__ == "__main__":
    unittest.main()
