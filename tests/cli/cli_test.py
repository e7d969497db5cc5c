"""Golden runs of the command line: the words, keys and statuses that scripts rely on."""
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, digest, files_below, run, run_json  # noqa: E402
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

    def test_target_exists(self):
        target = self.tmp / "there"
        self.ok("reshard", LLAMA, target, "--tp", 1, "--pp", 1)
        self.assertIn("--force", self.refused(2, "reshard", LLAMA, target, "--tp", 2))
        self.ok("reshard", LLAMA, target, "--tp", 4, "--pp", 1, "--force")
        self.assertEqual(len(list((target / "iter_0000010").iterdir())), 4)

    def test_impossible_layouts(self):
        for flags in (["--tp", 3], ["--pp", 3], ["--tp", 16], ["--pp", 2, "--vpp", 4], ["--ep", 2], ["--pp-layout", "E|t"], ["--first-stage-layers", 9], ["--first-stage-layers", 0],
                      ["--last-stage-layers", 0]):
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

    def test_drop(self):
        self.refused(6, "hash", LLAMA, "--drop", "layers.0.mlp.norm.weight")

    def test_casts(self):
        self.ok("convert", LLAMA, self.tmp / "f32", "--to", "torch_dist", "--dtype", "f32")
        self.ok("convert", self.tmp / "f32", self.tmp / "bf16", "--to", "mp_rank", "--dtype", "bf16")
        self.assertEqual(digest(self.tmp / "bf16"), digest(LLAMA))
        self.assertNotEqual(digest(self.tmp / "f32"), digest(LLAMA))

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
        self.assertEqual((status, out["dropped"]), (0, [{"key": "zzz", "why": "--drop"}]))
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
        self.assertEqual((status, out["dropped"]), (0, [{"key": key, "why": why}]))
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
