"""reshard and convert --device cuda against --device cpu: the same bytes, the same refusals, nothing half written.

SHARDKIT is a binary whose devices are emulated, or the real one; without a device the real one is skipped with the reason."""
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, files_below, run, run_json

EMULATED = "+emulated" in run("--version")[1]
SOURCES = sorted(str(p.relative_to(DATA)) for kind in ("mcore/*", "legacy/*", "pairs/*") for p in DATA.glob(kind + "/*") if p.is_dir())
SOURCES += sorted(str(p.relative_to(DATA)) for kind in ("hf", "dcp") for p in DATA.glob(kind + "/*") if p.is_dir())
LAYOUTS = (["--tp", "1", "--pp", "1"], ["--tp", "2", "--pp", "2"], ["--tp", "4", "--pp", "1"])
LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"


def environment(**more):
    return {**os.environ, **{f"SHARDKIT_EMULATED_{key}": str(value) for key, value in more.items()}}


class Reshard(Case):
    def both(self, name, *args, device=()):
        """Runs on the CPU and on the device; True where both wrote, and then the same."""
        outcomes = []
        for side, more in (("cpu", ["--device", "cpu"]), ("cuda", ["--device", "cuda", *device])):
            target = self.tmp / f"{name}-{side}"
            status, _, err = run(args[0], args[1], target, *args[2:], *more, "-q")
            outcomes.append((status, err.replace(str(target), "DST"), files_below(target) if target.exists() else None))
        (status, err, files), (other_status, other_err, other_files) = outcomes
        self.assertEqual((status, err), (other_status, other_err), args)
        self.assertEqual(files is None, other_files is None, args)
        if files is not None:
            self.assertEqual(files.keys(), other_files.keys(), args)
            for file, content in files.items():
                self.assertTrue(content == other_files[file], f"{args}: {file} differs")
        return status == 0

    def test_every_layout(self):
        done = sum(self.both(f"{i}-{j}", "reshard", DATA / source, *layout, "--weights-only") for i, source in enumerate(SOURCES) for j, layout in enumerate(LAYOUTS))
        self.assertGreater(done, 30)

    def test_every_format(self):
        done = sum(self.both(f"{i}-{to}", "convert", DATA / source, "--to", to, "--weights-only", "--max-shard-size", "100KB")
                   for i, source in enumerate(SOURCES) for to in ("torch_dist", "mp_rank", "dcp", "hf"))
        self.assertGreater(done, 60)

    def test_hdf5(self):
        """Chunks lie in the file in the order in which they were done, on the CPU as well: contents are compared."""
        for i, source in enumerate(SOURCES[::5]):
            for side in ("cpu", "cuda"):
                self.ok("convert", DATA / source, self.tmp / f"{i}-{side}", "--to", "hdf5", "--weights-only", "--device", side, "-q")
            self.ok("diff", self.tmp / f"{i}-cpu", self.tmp / f"{i}-cuda")

    def test_casts(self):
        for dtype in ("f64", "f32", "f16", "f8_e4m3", "f8_e5m2"):
            self.assertTrue(self.both(dtype, "convert", LLAMA, "--to", "hf", "--dtype", dtype))
            self.assertTrue(self.both("tp-" + dtype, "convert", LLAMA, "--to", "mp_rank", "--dtype", dtype, "--tp", "4", "--pp", "1"))

    def test_padding_rows(self):
        for pad in ("zeros", "last", "mean"):
            self.assertTrue(self.both(pad, "reshard", DATA / "mcore/gpt_tied_bf16_div128/tp1pp1", "--tp", "2", "--pad", pad))

    def test_small_budgets(self):
        for i, limits in enumerate((["--mem-limit", "1"], ["--mem-limit", "700KiB", "--threads", "3"], ["--device-mem-limit", "400KiB"])):
            self.assertTrue(self.both(f"budget-{i}", "reshard", LLAMA, "--tp", "4", "--pp", "1", device=limits))
            self.assertTrue(self.both(f"convert-{i}", "convert", LLAMA, "--to", "hf", device=limits))

    def test_findings_are_the_same(self):
        for hostile in ("mega_layernorm_replica_differs", "mega_tied_copy_differs"):
            self.assertFalse(self.both(hostile, "reshard", DATA / "hostile" / hostile, "--tp", "1", "--pp", "1"))
        source = self.copy("mcore/llama_untied_bf16/tp1pp1")
        shard = next(f for f in sorted(source.rglob("*.distcp")) if f.stat().st_size > 100_000)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        self.assertFalse(self.both("flipped", "reshard", source, "--tp", "2"))

    def test_verify(self):
        for source in [*(DATA / s for s in SOURCES[::3]), *sorted((DATA / "hostile").iterdir())]:
            outcomes = []
            for side in ("cpu", "cuda"):
                status, out, err = run("verify", source, "--json", "--device", side)
                found = json.loads(out) if out else {}
                self.assertEqual(found.pop("device", "none"), ("none" if not out else "cpu" if side == "cpu" else "cuda:0"))
                found.pop("device_why", None)
                self.assertEqual("device_use" in found, bool(out) and side == "cuda")
                found.pop("device_use", None)
                outcomes.append((status, found, err))
            self.assertEqual(outcomes[0], outcomes[1], source)

    def test_a_damaged_chunk(self):
        """What cannot be unpacked is a finding; the rest is still checked."""
        self.ok("convert", LLAMA, self.tmp / "x", "--to", "hdf5", "--threads", "1", "-q")  # chunks lie in one order then
        file = next((self.tmp / "x").rglob("*.h5"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2:len(content) // 2 + 64] = bytes(64)
        file.write_bytes(content)
        (status, cpu), (other_status, cuda) = (run_json("verify", self.tmp / "x", "--device", side) for side in ("cpu", "cuda"))
        self.assertEqual((status, cpu["findings"]), (other_status, cuda["findings"]))
        self.assertEqual(status, 1)

    def test_what_is_reported(self):
        status, out = run_json("convert", LLAMA, self.tmp / "x", "--to", "hf", "--device", "cuda")
        self.assertEqual(status, 0)
        self.assertEqual((out["device"], out["device_why"]), ("cuda:0", "asked for"))
        self.assertEqual(out["bytes_through_device"] + out["bytes_copied_in_kernel"], out["bytes_written"])
        self.assertGreater(out["bytes_through_device"], 0)
        self.assertTrue(out["device_use"]["storage"])
        self.assertLessEqual(out["device_use"]["pinned_memory_bytes"], 256 << 20)
        status, out = run_json("convert", DATA / "hf/llama_untied_bf16", self.tmp / "y", "--to", "dcp", "--device", "auto")
        self.assertEqual((status, out["device"]), (0, "cuda:0"))
        self.assertTrue(out["device_why"].startswith("auto: "), out["device_why"])

    def test_no_such_device(self):
        err = self.refused(8, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--device", "cuda:99")
        self.assertIn("there is no such device", err)
        self.assertFalse((self.tmp / "x").exists())
        self.refused(2, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--device", "gpu")

    def test_a_device_budget_that_holds_nothing(self):
        err = self.refused(8, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--device", "cuda", "--device-mem-limit", "1000")
        self.assertIn("is the least", err)
        self.assertEqual(list(self.tmp.iterdir()), [])

    @unittest.skipUnless(EMULATED, "needs several devices")
    def test_several_devices(self):
        source = self.tmp / "source"
        source.mkdir()
        shape, count = [512, 1024], 12  # enough for six lanes
        size = 2 * shape[0] * shape[1]
        header = json.dumps({f"t{i}": {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}).encode()
        values = random.Random(1).randbytes(size * count)
        (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(b & 0xBF if i % 2 else b for i, b in enumerate(values)))  # finite
        self.ok("convert", source, self.tmp / "cpu", "--to", "dcp", "--dtype", "f32", "-q")
        for devices, used in ((1, 1), (2, 2), (3, 3), (5, 3)):
            target = self.tmp / f"cuda-{devices}"
            args = ("convert", source, target, "--to", "dcp", "--dtype", "f32", "--threads", "4", "--device-mem-limit", "12MB", "--json")
            status, out, err = run(*args, "--device", "cuda", env=environment(DEVICES=devices))
            self.assertEqual(status, 0, err)
            report = json.loads(out)
            self.assertEqual(report["device"], ", ".join(f"cuda:{i}" for i in range(devices)))
            self.assertEqual(report["device_use"]["devices"], used, report["device_use"])
            self.assertEqual(files_below(self.tmp / "cpu"), files_below(target))
            status, out, err = run("verify", target, "--threads", "4", "--device", "cuda", "--json", env=environment(DEVICES=devices))
            self.assertEqual(status, 0, out + err)
        status, out, err = run(*args[:2], self.tmp / "one", *args[3:], "--device", "cuda:4", env=environment(DEVICES=5))
        self.assertEqual((status, json.loads(out)["device"], json.loads(out)["device_use"]["devices"]), (0, "cuda:4", 1), err)

    @unittest.skipUnless(EMULATED, "only an emulated device has settable memory")
    def test_out_of_memory(self):
        args = ("reshard", LLAMA, self.tmp / "x", "--tp", "1", "--pp", "1", "--device", "cuda", "--device-mem-limit", "50MB", "-q")
        err = self.refused(8, *args, env=environment(MEMORY=100_000))
        self.assertIn("is the least", err)
        self.assertEqual(list(self.tmp.iterdir()), [])
        self.ok(*args, env=environment(MEMORY=600 << 10))  # buffers shrink to what is free

    @unittest.skipUnless(EMULATED, "only an emulated device is lost when asked to be")
    def test_a_lost_device(self):
        for after in (0, 1, 7, 20):
            err = self.refused(8, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--pp", "1", "--device", "cuda", "--mem-limit", "1", "-q", env=environment(LOST_AFTER=after))
            self.assertIn("lost", err)
            self.assertEqual(list(self.tmp.iterdir()), [])

    @unittest.skipUnless(EMULATED, "the real way needs a file system that has it")
    def test_direct_storage(self):
        for i, source in enumerate(("mcore/llama_untied_bf16/tp1pp1", "hf/gpt2_tied_f32", "mcore/llama_untied_bf16/tp2pp2")):
            for j, args in enumerate((["--to", "hf"], ["--to", "torch_dist", "--tp", "2"])):
                self.ok("convert", DATA / source, self.tmp / f"{i}-{j}-cpu", *args)
                status, out, err = run("convert", DATA / source, self.tmp / f"{i}-{j}-cuda", *args, "--device", "cuda", "--json", env=environment(DIRECT=1))
                self.assertEqual(status, 0, err)
                self.assertIn("direct storage", out)
                self.assertEqual(files_below(self.tmp / f"{i}-{j}-cpu"), files_below(self.tmp / f"{i}-{j}-cuda"))

    @unittest.skipUnless(EMULATED, "needs a device slow enough to be stopped")
    def test_interruption(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            process = subprocess.Popen([SHARDKIT, "reshard", str(LLAMA), str(self.tmp / "x"), "--tp", "1", "--pp", "1", "--device", "cuda", "--mem-limit", "1", "-q"],
                                       stderr=subprocess.PIPE, text=True, env=environment(PAUSE_US=100_000))
            until = time.monotonic() + 30
            while not list(self.tmp.iterdir()) and time.monotonic() < until:  # until it writes
                time.sleep(0.01)
            process.send_signal(number)
            err = process.communicate(timeout=60)[1]
            self.assertEqual(process.returncode, 128 + number, err)
            self.assertEqual(len(err.strip().splitlines()), 1, err)
            self.assertEqual(list(self.tmp.iterdir()), [])

    def test_a_write_that_fails(self):
        limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))  # noqa: E731
        err = self.refused(7, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--pp", "1", "--device", "cuda", "-q", preexec_fn=limit)
        self.assertIn("File too large", err)
        self.assertEqual(list(self.tmp.iterdir()), [])

    def test_parts(self):
        for index in (1, 2):
            self.ok("reshard", LLAMA, self.tmp / "parts", "--tp", "4", "--pp", "1", "--part", f"{index}/2", "--device", "cuda", "-q")
        self.ok("reshard", LLAMA, self.tmp / "whole", "--tp", "4", "--pp", "1", "-q")
        self.assertEqual(files_below(self.tmp / "parts"), files_below(self.tmp / "whole"))


if __name__ == "__main__":
    if not EMULATED:
        status, _, why = run("plan", LLAMA, "/nowhere/x", "--device", "cuda")
        if status == 8:
            print(f"skipped: {why.strip()}")
            sys.exit(77)
    unittest.main()
