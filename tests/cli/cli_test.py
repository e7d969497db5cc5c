"""Golden runs of the command line: the words, keys and statuses that scripts rely on."""
import json
import os
import pathlib
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, digest, files_below, run, run_json, sanitized  # noqa: E402
from torch_edit import edit_file  # noqa: E402

LLAMA = DATA / "legacy/llama_untied_bf16/tp2pp2"
DIST = DATA / "mcore/llama_untied_bf16/tp2pp2"


class Inspect(Case):
    def test_json_keys(self):
        _, out = run_json("inspect", LLAMA)
        self.assertEqual(out["format"], "mp_rank")
        self.assertEqual(out["iteration"], 10)
        self.assertEqual({k: out["layout"][k] for k in ("tp", "pp", "vpp", "ep", "etp")}, {"tp": 2, "pp": 2, "vpp": 1, "ep": 1, "etp": 2})
        self.assertIs(out["tied"], False)
        self.assertEqual(out["parameters"], 180800)
        tensor = next(t for t in out["tensors"] if t["key"] == "decoder.layers.3.mlp.linear_fc2.weight")
        self.assertEqual((tensor["dtype"], tensor["shape"], len(tensor["shards"])), ("bf16", [64, 128], 2))
        self.assertEqual(tensor["shards"][1]["box"], {"lo": [0, 64], "size": [64, 64]})
        self.assertEqual(tensor["shards"][1]["file"], "mp_rank_01_001/model_optim_rng.pt")

    def test_torch_dist_and_dcp(self):
        self.assertEqual(run_json("inspect", DIST)[1]["format"], "torch_dist")
        _, out = run_json("inspect", DATA / "dcp/dtensor_2x2")
        self.assertEqual((out["format"], out["layout"]), ("dcp", None))
        self.assertIn("f8_e4m3", {t["dtype"] for t in out["tensors"]})

    def test_glob(self):
        _, out = run_json("inspect", LLAMA, "--tensors", "*.linear_qkv.*")
        self.assertEqual(len(out["tensors"]), 4)

    def test_not_found(self):
        self.refused(3, "inspect", self.tmp / "nothing")
        self.refused(4, "inspect", self.tmp)

    def test_what_no_target_can_name_or_hold(self):
        def write(name, keys):
            folder = self.tmp / name
            folder.mkdir()
            head = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, key in enumerate(keys)}).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + struct.pack(f"<{len(keys)}f", *([1e30] * len(keys))))
            return folder

        for name, keys in (("nul", ["a\0x", "a\0y"]), ("unnamed", ["", "b"])):  # HDF5's names are C's; the first ended in a deadlock
            self.assertIn("has no name in HDF5", self.refused(4, "convert", write(name, keys), self.tmp / "out", "--to", "hdf5", "-q"))
        self.ok("convert", write("named", ["zzz"]), self.tmp / "surrogate", "--to", "dcp", "-q")
        metadata = self.tmp / "surrogate/.metadata"
        metadata.write_bytes(metadata.read_bytes().replace(b"zzz", "\ud800".encode(errors="surrogatepass")))
        self.assertIn("the name is no UTF-8", self.refused(4, "convert", self.tmp / "surrogate", self.tmp / "out", "--to", "hf", "-q"))
        nothing = write("nothing", [])
        self.assertIn("holds no tensors", self.refused(6, "convert", nothing, self.tmp / "out", "--to", "dcp", "-q"))
        self.assertEqual(run("verify", nothing)[0], 1)
        self.assertFalse((self.tmp / "out").exists())
        large = write("large", ["a"])
        for dtype in ("f16", "f8_e4m3", "f8_e5m2"):
            status, out = run_json("convert", large, self.tmp / dtype, "--to", "hf", "--dtype", dtype)
            self.assertEqual((status, any("shardkit verify counts" in note for note in out["notes"])), (0, True), out["notes"])
            self.assertEqual(run("verify", self.tmp / dtype)[0], 1)


    def test_a_view_that_is_no_plain_memory_is_named(self):
        def text(what):
            return b"X" + struct.pack("<I", len(what)) + what

        storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\1tQ"
        pickle = b"\x80\2}" + text(b"model") + b"}" + text(b"odd") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\1\x85K\1\x85\x89ccollections\nOrderedDict\n)R}" + text(b"neg") + b"\x88stRss."
        path = self.tmp / "model.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("data.pkl", pickle), ("data/0", b"\0" * 4), ("version", b"3")):
                archive.writestr(f"model/{name}", data)
        self.assertIn("'model.odd': tensor: a lazily transformed one ('neg') is not supported", self.refused(4, "inspect", path))


class Usage(Case):
    def test_statuses(self):
        self.refused(2, "frobnicate")
        self.refused(2, "reshard", LLAMA)
        self.refused(2, "convert", LLAMA, self.tmp / "x", "--to", "nonsense")
        self.refused(8, "reshard", LLAMA, self.tmp / "x", "--device", "cuda:99")
        self.refused(2, "reshard", LLAMA, self.tmp / "x", "--mem-limit", "lots")
        self.assertEqual(run("--help")[0], 0)
        self.assertEqual(run("reshard", "--help")[0], 0)

    def test_sizes_below_one(self):
        for flag in ("--tp", "--pp", "--vpp", "--ep", "--etp"):
            for size in (0, -1):
                self.assertIn(flag, self.refused(2, "reshard", LLAMA, self.tmp / "x", flag, size))
                self.assertIn(flag, self.refused(2, "convert", LLAMA, self.tmp / "x", "--to", "hf", flag, size))
        for flag in ("--mem-limit", "--max-shard-size"):
            self.assertIn(flag, self.refused(2, "convert", LLAMA, self.tmp / "x", "--to", "hf", flag, "0"))

    def test_target_exists(self):
        target = self.tmp / "there"
        self.ok("reshard", LLAMA, target, "--tp", 1, "--pp", 1)
        self.assertIn("--force", self.refused(2, "reshard", LLAMA, target, "--tp", 2))
        self.ok("reshard", LLAMA, target, "--tp", 4, "--pp", 1, "--force")
        self.assertEqual(len(list((target / "iter_0000010").iterdir())), 4)

    def test_force_never_removes_what_is_read(self):
        run_folder = self.copy("legacy/llama_untied_bf16/tp2pp2")
        before = files_below(self.tmp)
        (self.tmp / "link").symlink_to(run_folder.parent)
        for cwd, source, target in (("/", run_folder, run_folder), ("/", run_folder, run_folder.parent), ("/", run_folder / "iter_0000010", run_folder), ("/", run_folder, run_folder / "iter_0000010"),
                                    (run_folder, ".", ".."), (run_folder.parent, run_folder.name, "."), ("/", run_folder, self.tmp / "link"), ("/", self.tmp / "link" / run_folder.name, run_folder.parent),
                                    ("/", run_folder, self.tmp / "link/..")):
            for command in ("convert", "plan"):
                self.assertIn("--force would remove", self.refused(2, command, source, target, "--to", "hf", "--force", cwd=cwd))
        (self.tmp / "link").unlink()
        self.ok("convert", DATA / "hf/llama_untied_bf16", self.tmp / "carries", "--to", "mp_rank", "-q")
        self.refused(2, "convert", self.tmp / "carries/release", self.tmp / "carries/hf", "--to", "dcp", "--force")  # its config.json is there
        shutil.rmtree(self.tmp / "carries")
        cache = self.tmp / "models--x"
        shutil.copytree(DATA / "hf/llama_untied_bf16", cache / "blobs")
        (cache / "snapshots/1").mkdir(parents=True)
        for blob in (cache / "blobs").iterdir():
            (cache / "snapshots/1" / blob.name).symlink_to(f"../../blobs/{blob.name}")
        self.refused(2, "convert", cache / "snapshots/1", cache / "blobs", "--to", "dcp", "--force")
        self.refused(2, "convert", cache / "snapshots/1", cache, "--to", "dcp", "--force")
        shutil.rmtree(cache)
        self.assertEqual(files_below(self.tmp), before)
        self.ok("convert", run_folder, run_folder / "hf", "--to", "hf", "-q")  # below SRC there is room
        self.ok("convert", run_folder, run_folder / "hf", "--to", "hf", "-q", "--force")
        self.assertEqual(digest(run_folder / "hf"), digest(run_folder))

    def test_force_says_that_it_takes_all_iterations(self):
        run_folder = self.copy("legacy/llama_untied_bf16/tp2pp2")
        (run_folder / "iter_0000020").mkdir()
        _, out = run_json("reshard", LLAMA, run_folder, "--tp", 1, "--pp", 1, "--force")
        self.assertTrue(any("held 2 iterations (iter_0000010 to iter_0000020)" in note for note in out["notes"]), out)

    def test_force_says_what_of_the_old_it_could_not_remove(self):
        target = self.tmp / "there"
        (target / "kept").mkdir(parents=True)
        (target / "kept/file").write_text("x")
        self.tmp.chmod(0o777)
        user = {}
        if os.geteuid() == 0:  # who removes everything
            user = {"user": 65534, "extra_groups": []}
            for path in (target, target / "kept"):
                os.chown(path, 65534, -1)
        (target / "kept").chmod(0o500)
        try:
            status, text, err = run("convert", self.copy("legacy/llama_untied_bf16/tp2pp2"), target, "--to", "hf", "--force", "--json", **user)
        except PermissionError:
            self.skipTest("this program is for root only")
        self.assertEqual(status, 0, err)
        out = json.loads(text)
        rest = next(self.tmp.glob(".there.shardkit-*"))
        self.assertTrue(any(str(rest) in note for note in out["notes"]), out)
        (rest / "kept").chmod(0o700)

    def test_a_long_name(self):
        target = self.tmp / ("x" * 250)
        self.ok("convert", LLAMA, target, "--to", "hf", "-q", "--report", self.tmp / ("r" * 250))
        self.ok("convert", LLAMA, target, "--to", "hf", "-q", "--force")
        for part in (1, 2):
            self.ok("convert", LLAMA, target, "--to", "hf", "-q", "--force", "--part", f"{part}/2")
        self.assertEqual(len(list(self.tmp.iterdir())), 2)

    @unittest.skipIf(sanitized(), "sanitizers need more")
    def test_few_descriptors(self):
        import resource
        for files in range(8, 20):
            for flags in (["--to", "hf", "--max-shard-size", "2KB"], ["--to", "mp_rank", "--tp", 4]):
                self.refused(7, "convert", LLAMA, self.tmp / "out", *flags, "--threads", 1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
                self.assertEqual(list(self.tmp.iterdir()), [])

    @unittest.skipIf(sanitized(), "sanitizers need more")
    def test_few_threads(self):
        import resource
        status, _, err = run("convert", LLAMA, self.tmp / "out", "--to", "hf", "--threads", 1000, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20)))
        self.assertIn(status, (0, 7), err)
        self.assertEqual(err.count("shardkit: error: "), status // 7, err)
        self.assertEqual([p.name for p in self.tmp.iterdir()], [] if status else ["out"])

    def test_impossible_layouts(self):
        for flags in (["--tp", 3], ["--pp", 3], ["--tp", 16], ["--pp", 2, "--vpp", 4], ["--ep", 2], ["--pp-layout", "E|t"], ["--first-stage-layers", 9]):
            self.refused(5, "reshard", LLAMA, self.tmp / "x", *flags)
        for layout in ("Et*1000000000|L", "E(t|)*1000000000L"):
            self.assertIn("expands to too many", self.refused(5, "reshard", LLAMA, self.tmp / "x", "--pp-layout", layout))
        self.assertEqual(list(self.tmp.iterdir()), [])


class Outcome(Case):
    def test_json_and_report(self):
        report = self.tmp / "report.json"
        _, out = run_json("convert", LLAMA, self.tmp / "d", "--to", "torch_dist", "--tp", 4, "--pp", 1, "--report", report)
        for key in ("source", "target", "bytes_read", "bytes_written", "bytes_copied_in_kernel", "seconds", "peak_memory_bytes", "tensors", "dropped", "carried", "tied"):
            self.assertIn(key, out)
        self.assertEqual(out["target"]["format"], "torch_dist")
        self.assertEqual(out["target"]["layout"]["tp"], 4)
        self.assertIn("rng_state", [d["key"] for d in out["dropped"]])
        self.assertEqual(json.loads(report.read_text())["tensors"], out["tensors"])
        self.ok("convert", LLAMA, f"{self.tmp}/e/", "--to", "hf", "--report", self.tmp / "e/report.json", "-q")
        self.assertTrue((self.tmp / "e/report.json").exists())

    def test_plan_writes_nothing(self):
        _, out = run_json("plan", LLAMA, self.tmp / "d", "--to", "torch_dist")
        self.assertGreater(out["bytes_written"], 300_000)
        self.assertEqual(list(self.tmp.iterdir()), [])

    def test_plan_counts_what_is_read_and_written(self):
        for source, to, flags in ((LLAMA, "hf", []), (LLAMA, "torch_dist", ["--tp", 1, "--pp", 4]), (DIST, "mp_rank", ["--tp", 4, "--pp", 1, "--dtype", "f32"]), (DATA / "hf/gpt2_tied_f32", "mp_rank", ["--tp", 2]),
                                  (DATA / "legacy/moe_bf16/tp1pp2ep2", "torch_dist", ["--ep", 4, "--pp", 1]), (DATA / "mcore/gpt_tied_bf16_div128/tp1pp1", "mp_rank", ["--tp", 4, "--pad", "last"]),
                                  (DATA / "dcp/dtensor_2x2", "hf", []), (DATA / "hf/deepseek_v3_mtp_bf16", "torch_dist", ["--tp", 2, "--pp", 2])):
            for more in ([], ["--mem-limit", "1MB", "--threads", 3]):
                args = (source, self.tmp / "out", "--to", to, *flags, *more)
                planned, done = run_json("plan", *args)[1], run_json("convert", *args)[1]
                for key in ("bytes_read", "bytes_written"):
                    self.assertEqual(planned[key], done[key], (key, args))
                shutil.rmtree(self.tmp / "out")
        _, packed = run_json("convert", LLAMA, self.tmp / "out", "--to", "hdf5", "--dtype", "f32")
        _, planned = run_json("plan", LLAMA, self.tmp / "new", "--to", "hdf5", "--dtype", "f32")
        self.assertLess(packed["bytes_written"], planned["bytes_written"])  # what packing saves is not known before
        self.assertLess(packed["bytes_written"], (self.tmp / "out/model.h5").stat().st_size)
        self.assertIn("TMPDIR", self.refused(7, "plan", LLAMA, self.tmp / "new", "--to", "hf", env={**os.environ, "TMPDIR": "/nowhere"}))

    def test_quiet(self):
        status, out, err = run("reshard", LLAMA, self.tmp / "d", "--tp", 1, "-q")
        self.assertEqual((status, out, err), (0, "", ""))

    def test_results_that_do_not_arrive(self):
        for args in (("hash", LLAMA), ("hash", LLAMA, "--json"), ("verify", LLAMA), ("inspect", LLAMA), ("plan", LLAMA, self.tmp / "d", "--tp", 1, "--json"),
                     ("families",), ("--help",)):
            for redirect in (">/dev/full", ">&-"):
                done = subprocess.run(["sh", "-c", f'"$0" "$@" {redirect}', SHARDKIT, *map(str, args)], stderr=subprocess.PIPE, text=True)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (7, 1), (args, redirect, done.stderr))
                self.assertTrue(done.stderr.startswith("shardkit: error: stdout: cannot write: "), done.stderr)
        # Nothing to tell is told; a file that takes the closed descriptor's number takes no results.
        closed = subprocess.run(["sh", "-c", '"$0" "$@" <&- >&- 2>&-', SHARDKIT, "convert", LLAMA, self.tmp / "e", "--to", "hf", "-q"])
        self.assertEqual(closed.returncode, 0)
        self.assertEqual(digest(self.tmp / "e"), digest(LLAMA))

    def test_a_reader_that_has_enough(self):
        for args, status in ((("hash", LLAMA, "--json"), (0,)), (("inspect", DATA / "pairs/deepseek_v3_mtp_bf16/tp1pp2", "--json"), (0, 141))):
            done = subprocess.Popen([SHARDKIT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            done.stdout.close()
            self.assertEqual(done.stderr.read(), "")
            self.assertIn(done.wait(), status)
            done.stderr.close()

    def test_an_empty_value_is_no_value_left_out(self):
        for args in (("verify", LLAMA, "--against", ""), ("verify", LLAMA, "--receipt="), ("verify", LLAMA, "--junit", ""), ("verify", LLAMA, "--family", ""), ("hash", ""),
                     ("inspect", LLAMA, "--tensors", "x", "--tensors", ""), ("reshard", LLAMA, self.tmp / "x", "--pp-layout", ""), ("plan", LLAMA, "", "--to", "hf"),
                     ("convert", LLAMA, self.tmp / "x", "--to", "hf", "--report", ""), ("diff", LLAMA, ""), ("families", ""), ("scan", ""), ("serve", "--token", ""), ("serve", "--history="),
                     *((("validate", LLAMA, flag, "") for flag in ("--reference", "--against", "--tokens", "--text", "--max-loss", "--html", "--compute", "--mem-limit")))):
            self.refused(2, *args)
        self.assertEqual(self.refused(2, "verify", LLAMA, "--against", ""), "shardkit: error: command line: --against is empty; should be a value, or left out\n")
        self.assertEqual(list(self.tmp.iterdir()), [])

    def test_optimizer_needs_weights_only(self):
        for name in ("mcore_optim/float16opt_tp2pp2", "mcore_optim/legacy_float16opt_tp2pp1"):
            self.assertIn("--weights-only", self.refused(4, "reshard", DATA / name, self.tmp / "x", "--tp", 1, "--pp", 1))
            _, out = run_json("reshard", DATA / name, self.tmp / name.replace("/", "_"), "--tp", 1, "--pp", 1, "--weights-only")
            self.assertTrue(any("optimizer" in d["key"] for d in out["dropped"]), out["dropped"])

    def test_vocabulary_padding(self):
        source = DATA / "mcore/gpt_tied_bf16_div128/tp1pp1"  # 250 tokens, padded to 256
        for pad in ("zeros", "last", "mean"):
            target = self.tmp / pad
            _, out = run_json("reshard", source, target, "--tp", 4, "--pad", pad)
            self.assertEqual(out["padded_vocab_size"], 512)
            self.assertEqual(out["padded"], ["embedding.word.weight"])
            self.assertEqual(digest(target), digest(source))
        back = self.tmp / "back"
        self.ok("reshard", self.tmp / "zeros", back, "--tp", 1)
        self.ok("diff", source, back)

    def test_vocabulary_below_the_recorded_one(self):
        """Tokens would be cut off."""
        for source in (LLAMA, DATA / "mcore/llama_untied_bf16/tp2pp2", DATA / "hf/llama_untied_bf16"):  # 250 tokens
            for to in ("hf", "mp_rank", "torch_dist"):
                self.assertIn("--vocab-size 200", self.refused(6, "convert", source, self.tmp / "x", "--to", to, "--vocab-size", 200))
                self.ok("convert", source, self.tmp / "x", "--to", to, "--vocab-size", 250, "--force", "-q")
        self.refused(6, "reshard", LLAMA, self.tmp / "y", "--vocab-size", 200)
        self.ok("diff", LLAMA, DIST, "--vocab-size", 200)  # nothing is lost
        self.ok("convert", LLAMA, self.tmp / "x", "--to", "hf", "--vocab-size", 256, "--force", "-q")  # padding rows as tokens
        self.refused(6, "convert", LLAMA, self.tmp / "x", "--to", "hf", "--vocab-size", 257, "--force")

    def test_multiple_of_the_vocabulary(self):
        source = DATA / "mcore/gpt_tied_bf16_div128/tp1pp1"
        for multiple, padded in ((1, 250), (64, 256), (300, 300)):
            _, out = run_json("reshard", source, self.tmp / str(multiple), "--make-vocab-size-divisible-by", multiple)
            self.assertEqual(out["padded_vocab_size"], padded)
            self.ok("reshard", self.tmp / str(multiple), self.tmp / f"{multiple}_2", "--tp", 2)  # what args say now holds
            self.assertEqual(digest(self.tmp / f"{multiple}_2"), digest(source))
        self.refused(2, "reshard", source, self.tmp / "x", "--make-vocab-size-divisible-by", 0)
        self.assertIn("9223372036854775807", self.refused(5, "convert", DATA / "hf/llama_untied_bf16", self.tmp / "x", "--to", "mp_rank", "--make-vocab-size-divisible-by", 2**63 - 1))

    def test_drop(self):
        self.refused(6, "hash", LLAMA, "--drop", "layers.0.mlp.norm.weight")
        plain = DATA / "dcp/dtensor_2x2"
        key = run_json("inspect", plain)[1]["tensors"][0]["key"]
        dist = DATA / "mcore/llama_untied_bf16/tp2pp2"
        self.ok("convert", plain, self.tmp / "less", "--to", "hf", "--drop", key, "-q")
        self.ok("diff", plain, self.tmp / "less", "--drop", key)  # of one of two it is enough
        for args in (("hash", plain), ("inspect", plain), ("verify", plain), ("convert", plain, self.tmp / "x", "--to", "hf"), ("diff", plain, plain),
                     ("verify", plain, "--against", plain), ("validate", LLAMA), ("reshard", dist, self.tmp / "x")):
            self.assertIn("'nothing.*'", self.refused(6, *args, "--drop", "nothing.*"))
        for args in (("hash", plain), ("convert", plain, self.tmp / "x", "--to", "hf"), ("diff", plain, plain)):
            self.refused(6, *args, "--drop", "*")
        self.assertIn("'decoder.layers.3.*'", self.refused(6, "reshard", dist, self.tmp / "x", "--drop", "decoder.layers.3.*"))  # stored as one tensor for all layers

    def test_other_files_of_a_folder_are_carried_or_named(self):
        self.ok("convert", DATA / "hf/llama_untied_bf16", self.tmp / "new", "--to", "hf", "-q")
        folder = self.tmp / "new"
        config = json.loads((folder / "config.json").read_text())
        for model_type in (config["model_type"], "unheard-of"):
            (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
            texts = {"tokenizer.json": "{}", "generation_config.json": "{}", "config.json": (folder / "config.json").read_text()}
            for name, text in texts.items():
                (folder / name).write_text(text)
            (folder / "modeling_x.py").write_text("")
            (folder / "onnx").mkdir(exist_ok=True)
            if not (folder / "vocab.json").exists():
                os.mkfifo(folder / "vocab.json")
            for to in ("hf", "dcp", "hdf5"):
                _, out = run_json("convert", folder, self.tmp / "out", "--to", to, "--force")
                self.assertEqual({name: (self.tmp / "out" / name).read_text() for name in texts}, texts)
                self.assertEqual([d["key"] for d in out["dropped"]], ["modeling_x.py", "onnx", "vocab.json"])
                self.assertTrue(set(texts) <= set(out["carried"]))
            self.ok("convert", folder, self.tmp / "out", "--to", "dcp", "--dtype", "f32", "--force", "-q")
            told = json.loads((self.tmp / "out/config.json").read_text())
            self.assertEqual(told.get("dtype", told.get("torch_dtype")), "float32")
        for i in range(120):
            (folder / f"note{i:03}").write_text("")
        _, out = run_json("convert", folder, self.tmp / "out", "--to", "dcp", "--force")
        self.assertEqual((len(out["dropped"]), out["dropped"][-1]["key"]), (101, "23 more files"))

    def test_casts(self):
        self.ok("convert", LLAMA, self.tmp / "f32", "--to", "torch_dist", "--dtype", "f32")
        self.ok("convert", self.tmp / "f32", self.tmp / "bf16", "--to", "mp_rank", "--dtype", "bf16")
        self.assertEqual(digest(self.tmp / "bf16"), digest(LLAMA))
        self.assertNotEqual(digest(self.tmp / "f32"), digest(LLAMA))
        for source in (LLAMA, DATA / "hf/llama_untied_bf16"):
            self.ok("convert", source, self.tmp / "hf", "--to", "hf", "--dtype", "f16", "--force", "-q")
            config = json.loads((self.tmp / "hf/config.json").read_text())
            self.assertEqual(config.get("dtype", config.get("torch_dtype")), "float16")

    def test_iteration(self):
        self.ok("inspect", LLAMA, "--iteration", 10)
        self.refused(3, "inspect", LLAMA, "--iteration", 11)
        for number in ("99999999999999999999", "-1", "x"):
            self.assertIn("--iteration", self.refused(2, "inspect", LLAMA, "--iteration", number))

    def test_numbers_are_decimal(self):
        self.ok("inspect", LLAMA, "--iteration", "0000010")
        _, out = run_json("plan", LLAMA, self.tmp / "d", "--to", "torch_dist", "--tp", "004", "--pp", "01", "--vocab-size", "0250", "--threads", "010")
        self.assertEqual((out["target"]["layout"]["tp"], out["target"]["layout"]["pp"], out["padded_vocab_size"]), (4, 1, 256))


class SameBytes(Case):
    def test_any_thread_count_and_budget(self):
        first = None
        for number, flags in enumerate((["--threads", 1], ["--threads", 2], ["--threads", 7], ["--threads", 2, "--mem-limit", "1MiB"])):
            for kind in ("torch_dist", "mp_rank"):
                self.ok("convert", LLAMA, self.tmp / f"{kind}{number}", "--to", kind, "--tp", 4, "--pp", 1, "-q", *flags)
            both = files_below(self.tmp / f"torch_dist{number}"), files_below(self.tmp / f"mp_rank{number}")
            first = first or both
            self.assertEqual(both, first)


class Parts(Case):
    def test_processes_together_write_the_same_bytes(self):
        for to in ("mp_rank", "torch_dist"):
            common = ["--to", to, "--tp", 4, "--pp", 2, "-q"]
            self.ok("convert", LLAMA, self.tmp / "whole", *common)
            running = [subprocess.Popen([SHARDKIT, "convert", str(LLAMA), str(self.tmp / "parts"), *map(str, common), "--part", f"{i}/3"]) for i in (1, 2, 3)]
            self.assertEqual([p.wait() for p in running], [0, 0, 0])
            self.assertEqual(files_below(self.tmp / "parts"), files_below(self.tmp / "whole"))
            self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), ["parts", "whole"])
            for name in ("parts", "whole"):
                import shutil
                shutil.rmtree(self.tmp / name)

    def test_unfinished_parts_publish_nothing(self):
        self.ok("convert", LLAMA, self.tmp / "parts", "--to", "torch_dist", "--part", "2/2", "-q")
        self.assertFalse((self.tmp / "parts").exists())
        self.ok("convert", LLAMA, self.tmp / "parts", "--to", "torch_dist", "--part", "1/2", "-q")
        self.assertEqual(digest(self.tmp / "parts"), digest(LLAMA))
        self.refused(2, "convert", LLAMA, self.tmp / "x", "--to", "torch_dist", "--part", "3/2")

    def test_parts_of_different_conversions_never_meet(self):
        source = self.copy("legacy/llama_untied_bf16/tp2pp2")
        shutil.copytree(source / "iter_0000010", source / "iter_0000020")
        tracker = source / "latest_checkpointed_iteration.txt"
        target, work = self.tmp / "out", self.tmp / ".out.parts"
        convert = ["convert", source, target, "--to", "hf", "-q", "--max-shard-size", "50KB"]
        self.ok(*convert, "--part", "1/2")
        before = files_below(work)
        for flag, value, said in (("--dtype", "f16", "--dtype nothing, here f16"), ("--pad", "mean", "--pad zeros, here mean"), ("--max-shard-size", "60KB", "--max-shard-size 50000, here 60000"),
                                  ("--to", "dcp", "--to hf, here dcp"), ("--tp", 4, "--tp 2, here 4")):
            given = [value if before == flag else x for before, x in zip([None, *convert], convert)]
            err = self.refused(6, *given, *([] if flag in convert else [flag, value]), "--part", "2/2")
            self.assertIn(said, err)
            self.assertIn(f"{work}: holds parts of another conversion", err)
        self.assertIn("parts 2, here 3", self.refused(6, *convert, "--part", "2/3"))
        tracker.write_text("20")
        self.assertIn("iteration iter_0000010, here iter_0000020", self.refused(6, *convert, "--part", "2/2"))
        tracker.write_text("10")
        file = next(source.glob("iter_0000010/*/model_optim_rng.pt"))
        facts = file.stat()
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
        self.assertIn("written at other times", self.refused(6, *convert, "--part", "2/2"))
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        self.assertEqual(files_below(work), before)
        self.assertFalse(target.exists())
        moved = self.tmp / "elsewhere"
        source.rename(moved)  # where the source lies is no matter
        self.ok("convert", moved, *convert[2:], "--part", "2/2")
        self.assertEqual(digest(target), digest(moved))
        self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), ["copy", "elsewhere", "out"])

    def test_what_abandoned_parts_leave(self):
        convert = ["convert", LLAMA, self.tmp / "out", "--to", "hf", "-q"]
        self.refused(5, "reshard", LLAMA, self.tmp / "out", "--tp", 3, "--part", "1/2")
        self.assertEqual(list(self.tmp.iterdir()), [])  # what cannot be done begins nothing
        self.ok(*convert, "--part", "1/2")
        self.ok(*convert)  # another conversion made the target: the part waits for nothing any more
        self.assertEqual([p.name for p in self.tmp.iterdir()], ["out"])
        self.ok(*convert, "--part", "1/2", "--force")
        (self.tmp / ".out.parts/sums").rename(self.tmp / ".out.parts/done")
        self.assertIn("died while it did", self.refused(6, *convert, "--part", "2/2", "--force"))
        shutil.rmtree(self.tmp / ".out.parts")
        for name in (".out.parts", ".out.parts-abcdef", ".out.shardkit-notes", ".out.shardkit-1-x"):
            (self.tmp / name).mkdir()
            (self.tmp / name / "mine").write_text("mine")
        before = files_below(self.tmp)
        self.assertIn("holds no conversion.json of shardkit's", self.refused(6, *convert, "--part", "1/2", "--force"))
        self.ok(*convert, "--force")
        self.assertEqual(files_below(self.tmp), before)

    def test_a_part_that_cannot_begin_leaves_what_others_did(self):
        convert = [SHARDKIT, "convert", str(LLAMA), str(self.tmp / "out"), "--to", "hf", "-q", "--part"]
        for seconds in (0.001, 0.003, 0.005, 0.01, 0.02):
            first = subprocess.Popen([*convert, "1/2"], stderr=subprocess.DEVNULL)
            time.sleep(seconds)
            first.send_signal(signal.SIGSTOP)
            subprocess.run([*convert, "2/2"], check=True)
            first.send_signal(signal.SIGINT)
            first.send_signal(signal.SIGCONT)
            first.wait()
            self.assertTrue((self.tmp / "out").exists() or (self.tmp / ".out.parts/sums/1").exists())
            if not (self.tmp / "out").exists():
                subprocess.run([*convert, "1/2"], check=True)
            self.assertEqual((digest(self.tmp / "out"), [p.name for p in self.tmp.iterdir()]), (digest(LLAMA), ["out"]))
            shutil.rmtree(self.tmp / "out")

    def test_a_part_refuses_its_report_before_others_meet_it(self):
        self.assertIn("lies in DST", self.refused(2, "convert", LLAMA, self.tmp / "out", "--to", "hf", "--part", "1/2", "--report", self.tmp / "out/report.json"))
        self.assertEqual(list(self.tmp.iterdir()), [])

    def test_names_that_are_no_text(self):
        moved = self.tmp / os.fsdecode(b"iter_\xff")
        shutil.copytree(LLAMA / "iter_0000010", moved)
        for part in (1, 2):
            subprocess.run([SHARDKIT, "convert", moved, self.tmp / "out", "--to", "torch_dist", "-q", "--part", f"{part}/2"], check=True)
        self.assertEqual(digest(self.tmp / "out"), digest(LLAMA))

    def test_a_part_whose_folder_was_begun_anew(self):
        convert = [SHARDKIT, "convert", str(LLAMA), str(self.tmp / "out"), "--to", "hf", "-q", "--part"]
        for seconds in (0.001, 0.003, 0.005, 0.01, 0.02):
            first = subprocess.Popen([*convert, "1/2"], stderr=subprocess.PIPE, text=True)
            time.sleep(seconds)
            first.send_signal(signal.SIGSTOP)
            shutil.rmtree(self.tmp / ".out.parts", ignore_errors=True)
            second = subprocess.run([*convert, "2/2"])
            first.send_signal(signal.SIGCONT)
            err, status = first.communicate()[1], first.returncode
            self.assertEqual(second.returncode, 0)
            if (self.tmp / "out").exists():
                self.assertEqual((status, digest(self.tmp / "out")), (0, digest(LLAMA)))
            else:
                self.assertIn(status, (0, 6, 7), err)
            for path in list(self.tmp.iterdir()):
                shutil.rmtree(path)

    def test_a_plain_conversion_leaves_parts_of_others(self):
        self.ok("convert", LLAMA, self.tmp / "other", "--to", "hf", "-q", "--part", "1/2")
        self.ok("convert", LLAMA, self.tmp / "out", "--to", "hf", "-q")
        self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), [".other.parts", "out"])


class Plain(Case):
    def test_dcp_round_trip_and_safetensors(self):
        source = DATA / "dcp/fsdp2_adamw_4"
        self.ok("convert", source, self.tmp / "again", "--to", "dcp")
        self.assertEqual(digest(self.tmp / "again"), digest(source))
        self.ok("convert", source, self.tmp / "hf", "--to", "hf", "--max-shard-size", "10KB")
        self.assertTrue((self.tmp / "hf/model.safetensors.index.json").exists())
        self.assertEqual(digest(self.tmp / "hf"), digest(source))
        self.ok("convert", self.tmp / "hf", self.tmp / "one", "--to", "hf")
        self.assertEqual(digest(self.tmp / "one"), digest(source))
        self.ok("verify", self.tmp / "one")

    def test_bytes_items_alone(self):
        source = self.copy("dcp/fsdp2_adamw_4")

        def only_bytes(root):
            state = root.state
            for key in [k for k, v in state["state_dict_metadata"].items() if type(v).__name__ == "TensorStorageMetadata"]:
                del state["state_dict_metadata"][key]
                for index in [i for i in state["storage_data"] if i.state["fqn"] == key]:
                    del state["storage_data"][index]
        edit_file(source / ".metadata", only_bytes)
        self.assertGreater(len(run_json("inspect", source)[1]["objects"]), 0)
        self.ok("verify", source)
        self.ok("convert", source, self.tmp / "again", "--to", "dcp", "-q")
        self.ok("verify", self.tmp / "again")
        self.assertIn("holds no tensors", self.refused(6, "convert", source, self.tmp / "hf", "--to", "hf"))

    def test_no_family_no_layout(self):
        self.refused(5, "reshard", DATA / "dcp/dtensor_2x2", self.tmp / "x", "--tp", 2)
        self.assertIn("convert it to hf first", self.refused(4, "convert", DIST, self.tmp / "x", "--to", "dcp"))


class Diff(Case):
    def test_across_formats(self):
        _, out = run_json("diff", LLAMA, DIST)
        self.assertEqual(out, {"same": True, "only_in_a": [], "only_in_b": [], "different": []})

    def test_tokens_that_one_side_lacks(self):
        """A is not the measure of B: what B has more is a difference in both directions, for all who compare."""
        whole = {"hf": self.tmp / "hf", "dist": DIST, "ranks": LLAMA, "hdf5": self.tmp / "hdf5"}  # 250 tokens
        for to in ("hf", "hdf5"):
            self.ok("convert", DIST, whole[to], "--to", to, "-q")
        cut = self.tmp / "cut"
        cut.mkdir()
        config = json.loads((whole["hf"] / "config.json").read_text())
        (cut / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
        raw = (whole["hf"] / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header, data, at = json.loads(raw[8 : 8 + size]), b"", 0
        for key, tensor in header.items():
            if key == "__metadata__":
                continue
            lo, hi = tensor["data_offsets"]
            if key in ("model.embed_tokens.weight", "lm_head.weight"):
                hi = lo + (hi - lo) // 250 * 200
                tensor["shape"][0] = 200
            data += raw[8 + size + lo : 8 + size + hi]
            tensor["data_offsets"] = [len(data) - (hi - lo), len(data)]
        text = json.dumps(header).encode()
        (cut / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        for name, other in whole.items():
            for a, b in ((cut, other), (other, cut)):
                with self.subTest(name, a=a):
                    status, out = run_json("diff", a, b)
                    self.assertEqual((status, [d["key"] for d in out["different"]]), (1, ["embedding.word.weight", "output.weight"]))
                    self.assertIn("the rows that both have are equal", out["different"][0]["hint"])
                    self.assertEqual(self.finding("shape", a, "--against", b)["key"], "embedding.word.weight")
                    if name != "hdf5":  # holds no configuration
                        self.assertIn("tokens here", run("validate", a, "--against", b)[1])
                        self.assertEqual(run("validate", a, "--against", b)[0], 1)
        status, out = run_json("diff", cut, DIST, "--vocab-size", 100)
        self.assertEqual((status, out["notes"]), (0, [f"--vocab-size 100: {cut} records 200 tokens; the last 100 are not compared",
                                                     f"--vocab-size 100: {DIST} records 250 tokens; the last 150 are not compared"]))
        self.assertIn("are not compared", run("diff", cut, DIST, "--vocab-size", 100)[2])
        self.assertIn("are not compared", self.ok("verify", cut, "--against", DIST, "--vocab-size", 100))

    def test_tolerances(self):
        for flag in ("--atol", "--rtol"):
            for value in ("nan", "-1", "inf"):
                self.assertIn(flag, self.refused(2, "diff", LLAMA, LLAMA, flag, value))
            self.ok("diff", LLAMA, LLAMA, flag, "1e-3")

        def one(*bits):
            header = json.dumps({"x": {"dtype": "F32", "shape": [len(bits)], "data_offsets": [0, 4 * len(bits)]}}).encode()
            path = self.tmp / f"{len(list(self.tmp.iterdir()))}.safetensors"
            path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(bits)}I", *bits))
            return path
        nan, other_nan, inf, minus_inf = 0x7fc00000, 0x7fc00001, 0x7f800000, 0xff800000
        for a, b in ((nan, 0), (inf, minus_inf), (inf, 0)):
            self.assertEqual(run("diff", one(a, 0x3f800000), one(b, 0x3f800001), "--atol", "1e30", "--rtol", "1e30")[0], 1)
        status, out = run_json("diff", one(nan, 0x3f800000), one(other_nan, 0x3f800000))
        self.assertEqual((status, out["different"][0]["hint"]), (1, "NaNs of other bits; the numbers are equal"))

    def test_difference_is_located(self):
        other = self.copy("legacy/llama_untied_bf16/tp2pp2")
        change_one_number(other, "decoder.layers.2.mlp.linear_fc2.weight", [3, 70])
        status, out = run_json("diff", LLAMA, other)
        self.assertEqual(status, 1)
        self.assertEqual([(d["key"], d["count"], d["first"]) for d in out["different"]], [("layers.2.mlp.down.weight", 1, [3, 70])])
        self.assertGreaterEqual(out["different"][0]["max_ulp"], 1)


class Scan(Case):
    def test_names(self):
        status, out = run_json("scan", LLAMA / "iter_0000010/mp_rank_00_000/model_optim_rng.pt")
        self.assertEqual(status, 0)
        self.assertIn("argparse", {n["module"] for n in out["files"][0]["names"]})
        status, out = run_json("scan", DATA / "hostile/pt_os_system/model_optim_rng.pt")
        self.assertEqual(status, 1)
        self.assertEqual([n for n in out["files"][0]["names"] if n["verdict"] == "refuse"], [{"module": "posix", "name": "system", "verdict": "refuse"}])

    def test_behind_the_first_pickle(self):
        """pickle.load may be called again; torch.save of before 1.6 wrote five pickles and then the storages."""
        class Evil:
            def __reduce__(self):
                return os.system, ("true",)
        (self.tmp / "two.pkl").write_bytes(pickle.dumps(1) + pickle.dumps(Evil()))
        self.assertEqual(run("scan", self.tmp / "two.pkl")[0], 1)
        (self.tmp / "more.pkl").write_bytes(pickle.dumps(1) + b"whatever")
        self.assertIn("behind pickle 1", self.refused(4, "scan", self.tmp / "more.pkl"))
        status, out = run_json("scan", DATA / "torch/old_stream.pt")
        self.assertEqual((status, out["files"][0]["names"][0]["module"]), (0, "torch._utils"))


class Verify(Case):
    def test_junit_and_notes(self):
        junit = self.tmp / "junit.xml"
        _, out = run_json("verify", DIST, "--junit", junit)
        self.assertTrue(out["ok"])
        self.assertIn("unverifiable", [f["rule"] for f in out["findings"]])
        self.assertEqual(junit.read_text().count("<testcase"), 13)

    def test_keys_do_not_speak_to_the_terminal(self):
        key = "a\x1b[2J\x9b1m\u202etxt.\nsound\t\x7f"
        header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        for name, number in (("a", b"\0\0\xc0\x7f"), ("b", b"\0\0\0\0")):
            (self.tmp / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + number)
        for args in (("verify", "a"), ("inspect", "a"), ("hash", "a"), ("diff", "a", "b"), ("verify", "a", "--against", "b")):
            _, out, err = run(args[0], *(x if x.startswith("--") else self.tmp / f"{x}.safetensors" for x in args[1:]))
            self.assertIn("a?[2J?1m?txt. sound ?", out, args)
            self.assertNotIn("sound", [line.split()[0] for line in out.splitlines() if line.strip()])
            self.assertNotRegex(out + err, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", args)

    def test_against(self):
        self.ok("verify", LLAMA, "--against", DIST)
        status, out = run_json("verify", LLAMA, "--against", DATA / "legacy/llama_tied_bf16/tp2pp2")
        self.assertEqual(status, 1)

    def test_flipped_payload_byte(self):
        other = self.copy("legacy/llama_untied_bf16/tp2pp2")
        change_one_number(other, "decoder.layers.2.mlp.linear_fc2.weight", [3, 70], fix_sum=False)
        self.assertIn("CRC-32", self.finding("checksum", other)["message"])
        self.refused(4, "reshard", other, self.tmp / "x", "--tp", 1)
        self.refused(4, "hash", other)
        self.assertFalse((self.tmp / "x").exists())

    FIRST, SECOND = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"

    def with_one_more(self, name, key, dtype, shape, numbers):
        """A copy of the Llama whose second shard holds one more tensor."""
        copy = self.tmp / name
        shutil.copytree(DATA / "hf/llama_untied_bf16", copy)
        path = copy / self.SECOND
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8:8 + size]), raw[8 + size:]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data + numbers)
        return copy

    def test_what_an_index_does_not_list_is_refused_or_dropped_by_name(self):
        copy = self.with_one_more("more", "zzz", "F32", [1], b"\0" * 4)
        found = self.finding("unexpected", copy)
        self.assertEqual(found["key"], "zzz")
        self.assertIn(f"{self.SECOND} holds it; model.safetensors.index.json does not list it", found["message"])
        self.assertEqual(run("inspect", copy)[0], 0)
        for command in (("hash", copy), ("diff", copy, DATA / "hf/llama_untied_bf16"), ("validate", copy), ("reshard", copy, self.tmp / "out"), ("convert", copy, self.tmp / "out", "--to", "torch_dist")):
            self.assertIn("zzz: ", self.refused(6, *command))
        self.ok("verify", copy, "--drop", "zzz")
        status, out = run_json("convert", copy, self.tmp / "out", "--to", "torch_dist", "--drop", "zz?")
        self.assertEqual((status, [d["key"] for d in out["dropped"] if d["why"] == "--drop"]), (0, ["zzz"]))
        (copy / "config.json").unlink()  # no family: keys are their own names
        self.assertIn("zzz: ", self.refused(6, "hash", copy))
        self.ok("hash", copy, "--drop", "zzz")
        buffer = self.with_one_more("buffer", "model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [1], b"\0" * 4)
        self.assertEqual(digest(buffer), digest(DATA / "hf/llama_untied_bf16"))

    def test_copies_that_an_index_does_not_name(self):
        key = "model.embed_tokens.weight"
        raw = (DATA / "hf/llama_untied_bf16" / self.FIRST).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8:8 + size])[key]
        numbers = raw[8 + size:][slice(*entry["data_offsets"])]
        same = self.with_one_more("same", key, entry["dtype"], entry["shape"], numbers)
        why = f"{self.SECOND} holds a copy of it; model.safetensors.index.json names {self.FIRST}"
        for command in ("verify", "validate", "inspect"):
            status, out = run_json(command, same)
            self.assertEqual(status, 0, out)
            self.assertIn({"rule": "unexpected", "severity": "warning", "key": key, "message": why}, out["findings"])
        for command in (("hash", same), ("hash", "-q", same), ("diff", same, DATA / "hf/llama_untied_bf16")):
            status, _, err = run(*command)
            self.assertEqual((status, err), (0, f"shardkit: warning: {key}: {why}\n"))
        for option in ("verify", "validate"):  # of the other side, too
            status, out = run_json(option, DATA / "hf/llama_untied_bf16", "--against", same)
            self.assertIn({"rule": "unexpected", "severity": "warning", "key": key, "message": f"{same}: {why}"}, out["findings"])
        status, out = run_json("convert", same, self.tmp / "out", "--to", "torch_dist")
        self.assertEqual((status, [d for d in out["dropped"] if d["key"] == key]), (0, [{"key": key, "why": why}]))
        shape = entry["shape"]
        for name, more in (("number", (entry["dtype"], shape, bytes([numbers[0] ^ 1]) + numbers[1:])), ("type", ("F16", shape, numbers)), ("shape", (entry["dtype"], shape[::-1], numbers))):
            copy = self.with_one_more(name, key, *more)
            self.assertEqual(self.finding("replica", copy)["key"], key)
            for command in (("hash", copy), ("validate", copy), ("convert", copy, self.tmp / "none", "--to", "dcp")):
                self.assertRegex(self.refused(6, *command), f"{key}: .*{self.FIRST}.*{self.SECOND}.*differ")

    def test_total_size_of_an_index(self):
        copy = self.copy("hf/llama_untied_bf16")
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        total = index["metadata"]["total_size"]
        on_disk = sum(f.stat().st_size for f in copy.glob("model-*.safetensors"))
        for value, said in ((total, False), (float(total), False), (on_disk, False), (total + 250 * 64 * 2, False), ("many", False), (None, False), (total - 2, True), (2 * total, True)):
            path.write_text(json.dumps(index | {"metadata": {"total_size": value}}))
            status, out = run_json("verify", copy)
            self.assertEqual((status, [f["key"] for f in out["findings"] if f["severity"] == "warning"]), (0, [path.name] if said else []), value)
        path.write_text(json.dumps({"weight_map": index["weight_map"]}))
        self.assertEqual(run("verify", copy)[0], 0)

    def test_files_of_an_index_below_the_folder(self):
        copy = self.copy("hf/llama_untied_bf16")
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {"weight_map": {key: "./" + file for key, file in index["weight_map"].items()}}))
        self.assertEqual(digest(copy), digest(DATA / "hf/llama_untied_bf16"))
        (copy / "sub").mkdir()
        for file in copy.glob("model-*.safetensors"):
            file.rename(copy / "sub" / file.name)
        path.write_text(json.dumps(index | {"weight_map": {key: ".//sub/./" + file for key, file in index["weight_map"].items()}}))
        self.assertEqual(digest(copy), digest(DATA / "hf/llama_untied_bf16"))
        for prefix in ("sub/../sub/", f"{copy}/sub/", "./../hf/", "."):
            path.write_text(json.dumps(index | {"weight_map": {key: prefix + file for key, file in index["weight_map"].items()}}))
            self.refused(3 if prefix == "." else 4, "hash", copy)

    def test_replica_and_tie(self):
        found = self.finding("replica", DATA / "hostile/mega_layernorm_replica_differs")
        self.assertIn("first at [7]", found["message"])
        self.assertIn("ULP", found["message"])
        self.assertIn("first at [3, 5]", self.finding("tie", DATA / "hostile/mega_tied_copy_differs")["message"])
        for name in ("mega_tied_copy_differs", "mega_layernorm_replica_differs"):
            self.refused(6, "reshard", DATA / "hostile" / name, self.tmp / "x", "--pp", 1)
            for command in (("hash", DATA / "hostile" / name), ("diff", DATA / "hostile" / name, LLAMA), ("diff", LLAMA, DATA / "hostile" / name)):
                self.assertRegex(self.refused(6, *command), "the copies in .* differ")
        status, out = run_json("verify", DATA / "legacy/llama_tied_bf16/tp2pp2", "--against", DATA / "hostile/mega_tied_copy_differs")
        self.assertEqual((status, [f["message"].count("mega_tied_copy_differs: the copies in") for f in out["findings"] if f["rule"] == "tie"]), (1, [1]))

    def test_exchanged_ranks(self):
        other = self.copy("legacy/llama_untied_bf16/tp2pp2") / "iter_0000010"
        os.rename(other / "mp_rank_00_000", other / "t")
        os.rename(other / "mp_rank_01_000", other / "mp_rank_00_000")
        os.rename(other / "t", other / "mp_rank_01_000")
        self.finding("rank", other.parent)
        self.refused(6, "hash", other.parent)

    def test_missing_rank(self):
        other = self.copy("legacy/llama_untied_bf16/tp2pp2") / "iter_0000010"
        import shutil
        shutil.rmtree(other / "mp_rank_01_001")
        self.assertIn("mp_rank_01_001", self.refused(6, "verify", other.parent))


class Interrupted(Case):
    def test_signals_leave_nothing(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
                target = self.tmp / "t"
                p = subprocess.Popen([SHARDKIT, "reshard", str(LLAMA), str(target), "--tp", "4", "--pp", "1", "-q"], stderr=subprocess.DEVNULL)
                time.sleep(delay)
                p.send_signal(number)
                p.wait()
                if target.exists():
                    self.assertEqual(digest(target), digest(LLAMA))
                    self.assertEqual(len([f for f in target.rglob("*") if f.is_file()]), 5)
                self.ok("reshard", LLAMA, target, "--tp", 4, "--pp", 1, "-q", "--force")
                self.assertEqual([p.name for p in self.tmp.iterdir()], ["t"])

    def test_a_signal_while_the_report_is_written(self):
        source, target, report = self.tmp / "big", self.tmp / "t", self.tmp / "r.json"
        source.mkdir()
        head = json.dumps({"a": {"dtype": "U8", "shape": [200 << 20], "data_offsets": [0, 200 << 20]}}).encode()
        with open(source / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(8 + len(head) + (200 << 20))
        p = subprocess.Popen([SHARDKIT, "convert", str(source), str(target), "--to", "dcp", "-q", "--no-sync", "--threads", "1", "--report", str(report)], stderr=subprocess.PIPE, text=True)
        while not target.exists():
            time.sleep(0.0005)
        p.send_signal(signal.SIGTERM)
        err = p.communicate()[1]
        if p.returncode != 0:
            self.assertEqual((p.returncode, err), (128 + signal.SIGTERM, f"shardkit: error: stopped by signal 15; {target} is published and whole, {report} is not written\n"))
            self.assertEqual(sorted(x.name for x in self.tmp.iterdir()), ["big", "t"])
        self.assertEqual(digest(target), digest(source))

    def test_signals_that_were_ignored_stay_so(self):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            p = subprocess.Popen([SHARDKIT, "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
            p.stdout.readline()
            ignored = int(next(line for line in pathlib.Path(f"/proc/{p.pid}/status").read_text().splitlines() if line.startswith("SigIgn")).split()[1], 16)
            self.assertTrue(ignored >> (number - 1) & 1)
            p.kill()
            p.communicate()

    def test_a_source_that_changes_meanwhile(self):
        def write(path, byte):
            head = json.dumps({path.stem: {"dtype": "U8", "shape": [100_000], "data_offsets": [0, 100_000]}}).encode()
            path.with_suffix(".new").write_bytes(struct.pack("<Q", len(head)) + head + bytes([byte]) * 100_000)
            path.with_suffix(".new").rename(path)

        def replace(path):
            write(path, 2)

        def overwrite(path):
            with open(path, "r+b") as file:
                file.seek(50_000)
                file.write(b"\2" * 50_000)

        for change in (replace, overwrite):
            source, target = self.tmp / "many", self.tmp / "out"
            source.mkdir()
            names = [f"k{i:04}.safetensors" for i in range(700)]
            for name in names:
                write(source / name, 1)
            (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {name[:5]: name for name in names}}))
            p = subprocess.Popen([SHARDKIT, "convert", str(source), str(target), "--to", "dcp", "-q", "--threads", "1", "--no-sync"], stderr=subprocess.PIPE, text=True)
            while not list(self.tmp.glob(".out.shardkit-*")) and p.poll() is None:
                time.sleep(0.0005)
            p.send_signal(signal.SIGSTOP)
            for name in names:
                change(source / name)
            p.send_signal(signal.SIGCONT)
            err = p.communicate()[1]
            self.assertEqual(p.returncode, 7, err)
            self.assertIn("was written to or replaced while it was read", err)
            self.assertFalse(target.exists())
            shutil.rmtree(source)

    def test_file_size_limit_is_a_write_error(self):
        import resource
        status, _, err = run("reshard", LLAMA, self.tmp / "t", "--tp", 1, "--pp", 1,
                             preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
        self.assertEqual(status, 7, err)
        self.assertEqual(list(self.tmp.iterdir()), [])


def change_one_number(run_folder, key, index, fix_sum=True):
    """Flips the lowest bit of one bf16 element of a checkpoint that mp_rank files hold, and mends the archive's CRC."""
    import zlib
    _, out = run_json("verify", run_folder)
    _, out = run_json("inspect", run_folder)
    tensor = next(t for t in out["tensors"] if t["key"] == key)
    for shard in tensor["shards"]:
        lo, size = shard["box"]["lo"], shard["box"]["size"]
        if all(l <= i < l + s for i, l, s in zip(index, lo, size)):
            break
    path = next(pathlib.Path(run_folder).rglob(shard["file"].split("/")[0])) / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    at = shard["offset"] + 2 * ((index[0] - lo[0]) * size[1] + index[1] - lo[1])
    old = zlib.crc32(bytes(data[shard["offset"]:shard["offset"] + shard["bytes"]]))
    data[at] ^= 1
    if fix_sum:
        new = zlib.crc32(bytes(data[shard["offset"]:shard["offset"] + shard["bytes"]]))
        data = bytearray(bytes(data).replace(old.to_bytes(4, "little"), new.to_bytes(4, "little")))
    path.write_bytes(bytes(data))


if __name__ == "__main__":
    unittest.main()
