"""Proof: hints that name planted mistakes, receipts that find what changed, content that args call for, JUnit."""
import json
import os
import pathlib
import re
import shutil
import struct
import sys
import time
import unittest
import zipfile
import xml.etree.ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, digest, run, run_json  # noqa: E402
from torch_edit import Archive, edit_archive, edit_file, stand_in  # noqa: E402

DENSE = "legacy/llama_untied_bf16"   # 4 layers, hidden 64, 8 heads in 4 groups of size 8, ffn 128, vocabulary 250 of 256
MOE = "legacy/moe_bf16/tp1pp2ep2"    # 4 layers, 4 experts
REFERENCE = DATA / "mcore/llama_untied_bf16/tp2pp2"  # the same weights in another format and layout
GROUPS, RATIO, HEAD, HIDDEN, FFN = 4, 2, 8, 64, 128


def rows_of(data, row_bytes):
    return [bytes(data[i:i + row_bytes]) for i in range(0, len(data), row_bytes)]


def each(values, change):
    """bf16 numbers, changed and cut back to bf16."""
    numbers = struct.unpack(f"<{len(values) // 2}H", values)
    out = []
    for bits in numbers:
        wide = change(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
        out.append(struct.unpack("<I", struct.pack("<f", wide))[0] >> 16)
    return struct.pack(f"<{len(out)}H", *out)


def fused(flat):
    """Row numbers of [q, k, v] by query group, or of [all q | all k | all v]."""
    q, k, v = (list(range(start, start + GROUPS * n * HEAD)) for start, n in ((0, RATIO), (1000, 1), (2000, 1)))
    if flat:
        return q + k + v
    take = lambda rows, n, g: rows[g * n * HEAD:(g + 1) * n * HEAD]  # noqa: E731
    return [row for g in range(GROUPS) for row in take(q, RATIO, g) + take(k, 1, g) + take(v, 1, g)]


class Hints(Case):
    def edited(self, change, name=DENSE + "/tp1pp1"):
        """A copy whose only rank file was changed: change(model dict, bytes of a key's storage)."""
        copy = self.copy(name)
        archive = Archive(next(copy.rglob("*.pt")))
        model = archive.root["model"]
        change(model, lambda key: archive.bytes_of(model[key]))
        archive.save()
        return copy

    def hints(self, b, a=REFERENCE):
        status, out = run_json("diff", a, b)
        self.assertEqual(status, 1)
        return {d["key"]: d["hint"] for d in out["different"]}

    def one_layer(self, change):
        found = self.hints(self.edited(change))
        self.assertTrue(all(key.startswith("layers.1.") for key in found), found)
        return {key.removeprefix("layers.1."): hint for key, hint in found.items()}

    def test_qkv_not_interleaved(self):
        def flatten(model, of):
            data = of("decoder.layers.1.self_attention.linear_qkv.weight")
            rows = dict(zip(fused(False), rows_of(data, 2 * HIDDEN)))
            data[:] = b"".join(rows[i] for i in fused(True))
        found = self.one_layer(flatten)
        self.assertEqual(sorted(found), [f"attention.{x}.weight" for x in "kqv"])
        for hint in found.values():
            self.assertTrue(hint.startswith("QKV not interleaved"), hint)

    def test_gate_and_up_swapped(self):
        def swap(model, of):
            data = of("decoder.layers.1.mlp.linear_fc1.weight")
            half = len(data) // 2
            data[:] = data[half:] + data[:half]
        self.assertEqual(self.one_layer(swap), {"mlp.gate.weight": "gate and up swapped", "mlp.up.weight": "gate and up swapped"})

    def test_rope_permutation(self):
        def permute(model, of):
            data = of("decoder.layers.1.self_attention.linear_qkv.weight")
            rows = rows_of(data, 2 * HIDDEN)
            for i, number in enumerate(fused(False)):
                if number < 2000:  # q and k, not v
                    at = number % 1000 % HEAD
                    rows[i] = bytes(data[(i - at + at % 2 * HEAD // 2 + at // 2) * 2 * HIDDEN:][:2 * HIDDEN])
            data[:] = b"".join(rows)
        found = self.one_layer(permute)
        self.assertEqual(sorted(found), ["attention.k.weight", "attention.q.weight"])
        for hint in found.values():
            self.assertTrue(hint.startswith("RoPE permutation: rotary pairs of every head alternate in b"), hint)

    def test_transposed(self):
        def transpose(model, of):
            data = of("decoder.layers.1.self_attention.linear_proj.weight")
            items = rows_of(data, 2)
            data[:] = b"".join(items[c * HIDDEN + r] for r in range(HIDDEN) for c in range(HIDDEN))
        self.assertEqual(self.one_layer(transpose), {"attention.out.weight": "transposed"})

    def test_plus_one_norm(self):
        def subtract(model, of):
            data = of("decoder.layers.1.input_layernorm.weight")
            data[:] = each(bytes(data), lambda x: x - 1)
        found = self.one_layer(subtract)
        self.assertTrue(found["attention.norm.weight"].startswith("+1 norm: b is a - 1"), found)

    def test_layers_in_vpp_order(self):
        def permute(model, of):
            order = {1: 2, 2: 1}  # PP 2 VPP 2 of 4 layers: the first stage holds 0 and 2
            for key in [k for k in model if re.match(r"decoder\.layers\.1\.", k)]:
                other = key.replace("layers.1.", f"layers.{order[1]}.")
                model[key], model[other] = model[other], model[key]
        found = self.hints(self.edited(permute))
        self.assertEqual(len(found), 2 * 9)
        for key, hint in found.items():
            layer = int(key.split(".")[1])
            self.assertEqual(hint, f"layers in VPP order taken as global (b, PP 2 VPP 2): layer {layer} of b is layer {3 - layer} of a")

    def test_padding_at_the_wrong_end(self):
        def shift(model, of):
            data = of("embedding.word_embeddings.weight")
            rows = rows_of(data, 2 * HIDDEN)
            data[:] = b"".join(rows[250:] + rows[:250])
        found = self.hints(self.edited(shift))
        self.assertEqual(list(found), ["embedding.word.weight"])
        self.assertTrue(found["embedding.word.weight"].startswith("vocabulary padding at the wrong end: 6 rows at the start of b"), found)

    def test_experts_in_local_order(self):
        copy = self.copy(MOE)
        for stage in ("000", "001"):
            ranks = [Archive(copy / f"iter_0000010/mp_rank_00_{stage}_{ep}/model_optim_rng.pt") for ep in ("000", "001")]
            for layer in (0, 1):
                for which in ("fc1", "fc2"):
                    key = f"decoder.layers.{layer}.mlp.experts.local_experts.{{}}.linear_{which}.weight"
                    one, two = ranks[0].bytes_of(ranks[0].root["model"][key.format(1)]), ranks[1].bytes_of(ranks[1].root["model"][key.format(0)])
                    one[:], two[:] = bytes(two), bytes(one)
            for rank in ranks:
                rank.save()
        found = self.hints(copy, DATA / "mcore/moe_bf16/tp1pp2ep2")
        self.assertEqual(len(found), 4 * 2 * 3)
        self.assertEqual(found["layers.3.mlp.experts.1.up.weight"], "experts ordered by local index before EP rank (b, EP 2): expert 1 of b is expert 2 of a")

    def test_tied_head_missing(self):
        def tie(model, of):
            of("output_layer.weight")[:] = of("embedding.word_embeddings.weight")
        untied = self.edited(tie)
        tied = self.tmp / "tied"
        shutil.copytree(untied, tied)

        def drop(root):
            del root["model"]["output_layer.weight"]
            root["args"].untie_embeddings_and_output_weights = False
        edit_archive(next(tied.rglob("*.pt")), drop)
        status, out = run_json("diff", untied, tied)
        self.assertEqual((status, out["only_in_a"]), (1, ["output.weight"]))
        self.assertTrue(out["hints"]["output.weight"].startswith("tied head missing in b"), out)
        self.assertIn("tied head missing in b", run("diff", untied, tied)[1])

    def test_no_known_mistake_no_hint(self):
        def change(model, of):
            of("decoder.layers.1.mlp.linear_fc2.weight")[101] ^= 0x40
        self.assertEqual(self.one_layer(change), {"mlp.down.weight": None})
        self.assertIn("mlp.down.weight", run("diff", REFERENCE, self.tmp / "copy" / DENSE / "tp1pp1")[1])

    def test_another_type(self):
        self.ok("convert", DATA / DENSE / "tp1pp1", self.tmp / "f32", "--to", "torch_dist", "--dtype", "f32")
        status, out = run_json("diff", REFERENCE, self.tmp / "f32")
        self.assertEqual(status, 1)
        self.assertTrue(all(d["hint"].endswith(": the same values as another type") for d in out["different"]), out["different"][0])


class Receipt(Case):
    def written(self, source, *flags):
        self.ok(source[0], DATA / source[1], self.tmp / "out", *flags, "--report", self.tmp / "report.json", "-q")
        return self.tmp / "out", self.tmp / "report.json"

    def test_where_no_report_can_be(self):
        source = DATA / DENSE / "tp2pp2"
        args = ("convert", source, self.tmp / "out", "--to", "torch_dist", "-q", "--report")
        for place in (self.tmp / "nowhere/report.json", self.tmp, "/dev/null/x"):
            self.refused(7, *args, place)  # before anything is written
        self.assertFalse((self.tmp / "out").exists())
        self.ok(*args, self.tmp / "out/report.json")
        self.assertIn("receipt", json.loads((self.tmp / "out/report.json").read_text()))

    def test_a_report_in_the_output_is_no_file_of_it(self):
        source, out = DATA / "hf/llama_untied_bf16", self.tmp / "out"
        (self.tmp / "link").symlink_to(self.tmp)
        for to, taken, folders in (("hf", ("config.json", "model.safetensors", "../out/./config.json"), ()), ("hdf5", ("model.h5",), ()),
                                   ("torch_dist", ("latest_checkpointed_iteration.txt", "release/.metadata", "hf/config.json"), ("release", "hf"))):
            args = ("convert", source, out, "--to", to, "-q", "--report")
            for name in taken:
                self.assertIn("is a file of the output", self.refused(2, *args, f"{out}/{name}"))
                self.assertIn("is a file of the output", self.refused(2, *args, f"{self.tmp}/link/out/{name}"))
            for name in folders:
                self.assertIn("is a folder of the output", self.refused(2, *args, out / name))
            self.refused(7, *args, out)
            self.refused(7, *args, out / "sub/r.json")
            self.refused(2, *args, "-")
            self.refused(2, "convert", source, out, "--to", "hf", "-q", "--part", "1/2", "--report", out / "r.json")
            self.assertEqual([p.name for p in self.tmp.iterdir()], ["link"])
            name = "release/r.json" if folders else "r.json"
            self.ok(*args, out / name)
            self.ok("verify", out, "--receipt", out / name)
            import shutil
            shutil.rmtree(out)

    def test_says_where_everything_came_from(self):
        out, report = self.written(("convert", DENSE + "/tp2pp2"), "--to", "torch_dist", "--tp", 4, "--pp", 1)
        summary = json.loads(report.read_text())
        receipt = summary["receipt"]
        self.assertEqual((receipt["version"], summary["tensors"]), (1, len(receipt["logical"])))
        self.assertEqual(receipt["model"], digest(out))
        on_disk = {str(f.relative_to(out)): f.stat().st_size for f in out.rglob("*") if f.is_file()}
        self.assertEqual({name: entry["bytes"] for name, entry in receipt["files"].items()}, on_disk)
        head = receipt["tensors"]["output_layer.weight"]
        self.assertEqual((head["dtype"], head["shape"], head["transforms"]), ("bf16", [256, 64], ["concatenated"]))
        self.assertEqual([(s["key"], s["file"], s["box"]) for s in head["sources"]],
                         [("output_layer.weight", f"mp_rank_0{rank}_001/model_optim_rng.pt", {"lo": [128 * rank, 0], "size": [128, 64]}) for rank in (0, 1)])
        # The bytes are where it says.
        source = DATA / DENSE / "tp2pp2/iter_0000010" / head["sources"][1]["file"]
        inspected = next(t for t in run_json("inspect", DATA / DENSE / "tp2pp2")[1]["tensors"] if t["key"] == "output_layer.weight")
        self.assertEqual([s["offset"] for s in inspected["shards"]], [s["offset"] for s in head["sources"]])
        self.assertLess(head["sources"][1]["offset"], source.stat().st_size)

    def test_lists_every_tensor(self):
        """Tensors that lie one behind another on both sides are moved at once."""
        for name, to in (("dcp/dtensor_2x2", "hf"), ("dcp/fsdp2_adamw_4", "dcp"), ("hf/llama_untied_bf16", "hf"), ("hf/gpt2_tied_f32", "dcp"), ("hf/deepseek_v3_mtp_bf16", "mp_rank"),
                         ("hf/gpt_oss_bf16", "torch_dist"), (DENSE + "/tp2pp2", "hf")):
            out, report = self.written(("convert", name), "--to", to)
            tensors = json.loads(report.read_text())["receipt"]["tensors"]
            stored = {t["key"]: t for t in run_json("inspect", out)[1]["tensors"]}
            self.assertEqual(set(tensors) - set(stored) if to == "torch_dist" else set(tensors) ^ set(stored), set(), name)
            for key, told in tensors.items():
                self.assertTrue(told["sources"] or "made" in told["transforms"] or 0 in told["shape"], (name, key))
                if told["transforms"] != ["copied"] or 0 in told["shape"]:
                    continue
                self.assertEqual([s["box"]["size"] for s in told["sources"]], [told["shape"]], (name, key))
            shutil.rmtree(out)

    def test_names_transforms(self):
        _, report = self.written(("reshard", "mcore/gpt_tied_bf16_div128/tp1pp1"), "--tp", 4, "--pad", "last")
        tensors = json.loads(report.read_text())["receipt"]["tensors"]
        self.assertIn("padded with last", tensors["embedding.word_embeddings.weight"]["transforms"])
        shutil.rmtree(self.tmp / "out")
        _, report = self.written(("convert", "mcore/gpt_tied_bf16_div128/tp2pp2"), "--to", "mp_rank", "--dtype", "f32")
        tensors = json.loads(report.read_text())["receipt"]["tensors"]
        self.assertIn("cast", tensors["decoder.final_layernorm.weight"]["transforms"])

    def test_checks_the_output_without_the_source(self):
        for kind in ("torch_dist", "mp_rank"):
            for more in ([], ["--no-sync"]):
                out, report = self.written(("convert", DENSE + "/tp2pp2"), "--to", kind, "--tp", 1, "--pp", 2, *more)
                self.ok("verify", out, "--receipt", report)
                moved = self.tmp / "elsewhere"
                out.rename(moved)
                self.ok("verify", moved, "--receipt", report)
                shutil.rmtree(moved)
        out, report = self.written(("convert", "dcp/fsdp2_adamw_4"), "--to", "hf")
        self.ok("verify", out, "--receipt", report)

    def test_finds_what_changed(self):
        out, report = self.written(("convert", DENSE + "/tp2pp2"), "--to", "mp_rank", "--tp", 1, "--pp", 1)

        def flip(model, of):
            of("decoder.layers.1.mlp.linear_fc2.weight")[101] ^= 0x40
        archive = Archive(next(out.rglob("*.pt")))
        flip(archive.root["model"], lambda key: archive.bytes_of(archive.root["model"][key]))
        archive.save()
        status, found = run_json("verify", out, "--receipt", report)
        self.assertEqual(status, 1)
        keys = {(f["rule"], f["key"]) for f in found["findings"] if f["severity"] == "error"}
        self.assertIn(("checksum", "layers.1.mlp.down.weight"), keys)
        self.assertIn(("checksum", "iter_0000010/mp_rank_00/model_optim_rng.pt"), keys)
        self.assertEqual(len(keys), 2)
        self.ok("verify", out)  # sound by itself

    def test_finds_files_and_tensors_that_came_or_went(self):
        out, report = self.written(("convert", DENSE + "/tp2pp2"), "--to", "torch_dist", "--tp", 1, "--pp", 1)
        tree = json.loads(report.read_text())
        tree["receipt"]["files"]["iter_0000010/__9_0.distcp"] = {"bytes": 3, "digest": "0" * 32}
        tree["receipt"]["logical"]["layers.9.mlp.up.weight"] = tree["receipt"]["logical"].pop("layers.1.mlp.up.weight")
        report.write_text(json.dumps(tree))
        status, found = run_json("verify", out, "--receipt", report)
        self.assertEqual(status, 1)
        self.assertEqual({(f["rule"], f["key"]) for f in found["findings"] if f["severity"] == "error"},
                         {("missing", "iter_0000010/__9_0.distcp"), ("missing", "layers.9.mlp.up.weight"), ("unexpected", "layers.1.mlp.up.weight")})

    def test_refuses_what_is_no_receipt(self):
        good = {"version": 1, "algorithm": "xxh3-128-256KiB", "vocab_size": None, "files": {}, "logical": {}}
        for text in ("", "[]", "{}", '{"receipt": 3}', "[" * 100_000, json.dumps({"receipt": {**good, "version": 2}}),
                     json.dumps({"receipt": {**good, "files": {"x": 1}}}), json.dumps({"receipt": {**good, "logical": {"x": "abc"}}}),
                     json.dumps({"receipt": {**good, "vocab_size": "x"}}), json.dumps({"receipt": {**good, "files": {"../x": {"bytes": 1, "digest": "0" * 32}}}}),
                     "\x00\xff"):
            (self.tmp / "r.json").write_text(text)
            self.refused(4, "verify", REFERENCE, "--receipt", self.tmp / "r.json")
        self.refused(3, "verify", REFERENCE, "--receipt", self.tmp / "nothing.json")

    def test_parts_leave_one_receipt(self):
        for part in (1, 2):
            self.ok("convert", DATA / DENSE / "tp2pp2", self.tmp / "out", "--to", "torch_dist", "--part", f"{part}/2", "--report", self.tmp / f"{part}.json", "-q")
        self.assertNotIn("receipt", json.loads((self.tmp / "1.json").read_text()))
        self.ok("verify", self.tmp / "out", "--receipt", self.tmp / "2.json")


class Expected(Case):
    """What args call for: whatever is taken away or added is found by verify and stops reshard before anything is written."""

    def edited(self, name, change, ranks="."):
        copy = self.copy(name)
        for path in sorted(copy.rglob("*.pt")):
            if re.search(ranks, str(path.relative_to(copy))):
                edit_archive(path, change)
        return copy

    def caught(self, copy, rule, key, statuses=(4, 6)):
        found = self.finding(rule, copy)
        self.assertIn(key, found["key"])
        status, _, err = run("reshard", copy, self.tmp / "out", "--tp", 1, "--pp", 1, "--ep", 1)
        self.assertIn(status, statuses, err)
        self.assertFalse((self.tmp / "out").exists())
        self.assertNotEqual(run("hash", copy)[0], 0)
        shutil.rmtree(self.tmp / "copy")

    @staticmethod
    def without(pattern):
        def change(root):
            for key in [k for k in root["model"] if re.search(pattern, k)]:
                del root["model"][key]
        return change

    @staticmethod
    def arg(**values):
        return lambda root: vars(root["args"]).update(values)

    def test_tensors_of_a_dense_model(self):
        for pattern, ranks, rule, key in (
                (r"layers\.1\.mlp\.linear_fc2\.weight", ".", "missing", "layers.1.mlp.down.weight"),
                (r"layers\.1\.mlp\.linear_fc2\.weight", "rank_01_000", "missing", "linear_fc2.weight"),
                (r"layers\.1\.input_layernorm", "rank_01_000", "missing", "decoder.layers.1.input_layernorm.weight"),
                (r"layers\.1\.", "rank_.._001", "missing", "layers.3"),
                (r"linear_qkv\.weight", ".", "missing", "attention.q.weight"),
                (r"final_layernorm", ".", "missing", "final_norm.weight"),
                (r"output_layer", ".", "missing", "output.weight"),
                (r"word_embeddings", ".", "missing", "embedding.word.weight")):
            with self.subTest(pattern=pattern, ranks=ranks):
                self.caught(self.edited(DENSE + "/tp2pp2", self.without(pattern), ranks), rule, key)
        hole = self.edited(DENSE + "/tp2pp2", self.without(r"layers\.1\.mlp\.linear_fc2\.weight"), "rank_01_000")
        self.assertIn("no shard holds [0:64, 64:128]", self.finding("coverage", hole)["message"])

    def test_experts(self):
        for pattern, ranks, key in (
                (r"layers\.1\.mlp\.experts.*\.1\.linear", "_000_001/", "layers.1.mlp.experts.3"),
                (r"experts\.1\.linear", "_00._001/", "mlp.experts.3"),       # the last one, in every layer
                (r"experts\.0\.linear_fc2", "_00._000/", "mlp.experts.0.down.weight"),
                (r"layers\.1\.mlp\.router", ".", "layers.1.mlp.router.weight"),
                (r"layers\.1\.mlp\.router", "_000_001/", "decoder.layers.1.mlp.router.weight"),
                (r"layers\.1\.mlp\.(router|experts)", "_000_", "layers.1.mlp.router.weight"),
                (r"mlp\.(router|experts)", ".", "mlp.experts.0")):
            with self.subTest(pattern=pattern, ranks=ranks):
                self.caught(self.edited(MOE, self.without(pattern), ranks), "missing", key)

    def test_halved_expert_tensors(self):
        def halve(root):
            for key, tensor in root["model"].items():
                if re.search(r"experts.*linear_fc1\.weight", key):
                    args = list(tensor.args)
                    args[2] = (args[2][0] // 2, args[2][1])
                    tensor.args = tuple(args)
        self.caught(self.edited(MOE, halve), "shape", "experts")

    def test_args_that_call_for_more_or_less(self):
        for values, rule, key in (
                ({"num_layers": 6}, "missing", "layers"), ({"num_layers": 2}, "unexpected", "layers"), ({"mtp_num_layers": 1}, "missing", "mtp.0"),
                ({"qk_layernorm": True}, "missing", "q_norm"), ({"add_qkv_bias": True}, "missing", "q.bias"), ({"normalization": "LayerNorm"}, "missing", "norm.bias"),
                ({"position_embedding_type": "learned_absolute"}, "missing", "embedding.position"), ({"num_query_groups": 2}, "shape", "linear_qkv")):
            with self.subTest(**values):
                self.caught(self.edited(DENSE + "/tp2pp2", self.arg(**values)), rule, key)
        for values, rule, key in (
                ({"num_experts": 8}, "shape", "router"), ({"moe_ffn_hidden_size": 24}, "shape", "experts"), ({"moe_layer_freq": [0, 1, 1, 1]}, "missing", "layers.0.mlp.gate"),
                ({"moe_router_enable_expert_bias": True}, "missing", "expert_bias"), ({"moe_shared_expert_intermediate_size": 48}, "missing", "mlp.shared")):
            with self.subTest(**values):
                self.caught(self.edited(MOE, self.arg(**values)), rule, key)

    def test_tensors_that_args_rule_out(self):
        for name, values, key in (
                ("legacy/gpt_tied_bf16_te_names/tp2pp2", {"add_bias_linear": False}, "attention.out.bias"),
                ("legacy/gpt_tied_bf16_te_names/tp2pp2", {"position_embedding_type": "rope"}, "embedding.position.weight"),
                ("legacy/gpt_tied_bf16_te_names/tp2pp2", {"normalization": "RMSNorm"}, "norm.bias"),
                (MOE, {"moe_layer_freq": [1, 1, 1, 0]}, "layers.3.mlp"), (MOE, {"moe_layer_freq": [1, 1, 1]}, "args.moe_layer_freq"),
                (MOE, {"moe_layer_freq": 0}, "args.moe_layer_freq"), (MOE, {"moe_layer_freq": "[1]*4"}, "args.moe_layer_freq")):
            with self.subTest(**values):
                self.caught(self.edited(name, self.arg(**values)), "unexpected", key)
        dist = self.tmp / "dist"
        for values, key in (({"qk_layernorm": False}, "norm.weight"), ({"mtp_num_layers": None}, "mtp.0."), ({"moe_router_enable_expert_bias": False}, "expert_bias")):
            self.ok("convert", DATA / "hf/deepseek_v3_mtp_bf16", dist, "--to", "mp_rank", "-q", "--force")
            edit_archive(next(dist.rglob("*.pt")), self.arg(**values))
            self.assertIn(key, self.finding("unexpected", dist)["key"])
            self.refused(6, "hash", dist)

        def older(root):  # did not speak of it
            del root["args"].add_bias_linear
        self.ok("hash", self.edited("legacy/gpt_tied_bf16_te_names/tp2pp2", older))

    def test_extra_keys(self):
        def add(root):
            root["model"]["decoder.surprise.weight"] = next(v for k, v in root["model"].items() if k.endswith(".weight"))
        self.caught(self.edited(DENSE + "/tp2pp2", add), "unexpected", "decoder.surprise.weight")

    def test_rank_folders(self):
        for name in ("mp_rank_00_001_001", "mp_rank_00_000_000"):
            copy = self.copy(MOE)
            shutil.rmtree(copy / "iter_0000010" / name)
            for command in (("verify", copy), ("reshard", copy, self.tmp / "out", "--ep", 1)):
                self.assertNotEqual(run(*command)[0], 0)
                self.refused(6, *command)
            shutil.rmtree(self.tmp / "copy")

    def test_torch_dist_metadata(self):
        def without(pattern):
            def change(root):
                state = root.state
                for key in [k for k in state["state_dict_metadata"] if re.search(pattern, k)]:
                    del state["state_dict_metadata"][key]
                for index in [i for i in state["storage_data"] if re.search(pattern, i.state["fqn"])]:
                    del state["storage_data"][index]
            return change

        def without_chunk(pattern):
            def change(root):
                tensor = next(v for k, v in root.state["state_dict_metadata"].items() if re.search(pattern, k))
                tensor.state["chunks"].pop()
            return change
        for name, change, rule, key in (
                ("mcore/llama_untied_bf16/tp2pp2", without(r"linear_fc2\.weight"), "missing", "mlp.down"),
                ("mcore/llama_untied_bf16/tp2pp2", without(r"output_layer"), "missing", "output.weight"),
                ("mcore/llama_untied_bf16/tp2pp2", without_chunk(r"linear_qkv\.weight"), "coverage", "linear_qkv"),
                ("mcore/moe_bf16/tp1pp2ep2", without(r"experts\.linear_fc2\.weight"), "missing", "mlp.experts.0.down"),
                ("mcore/moe_bf16/tp1pp2ep2", without(r"router"), "missing", "mlp.router"),
                ("mcore/moe_bf16/tp1pp2ep2", without(r"mlp\.(router|experts)"), "missing", "mlp.experts.0"),
                ("mcore/moe_bf16/tp1pp2ep2", without_chunk(r"experts\.linear_fc1\.weight"), "coverage", "experts")):
            copy = self.copy(name)
            edit_file(copy / "iter_0000010/.metadata", change)
            self.caught(copy, rule, key)

    def test_torch_dist_files(self):
        for name, status in (("__2_0.distcp", 3), (".metadata", 3), ("metadata.json", 4)):
            copy = self.copy("mcore/moe_bf16/tp1pp2ep2")
            os.remove(copy / "iter_0000010" / name)
            for command in (("verify", copy), ("hash", copy), ("reshard", copy, self.tmp / "out", "--ep", 1)):
                self.refused(status, *command)
            self.assertFalse((self.tmp / "out").exists())
            shutil.rmtree(self.tmp / "copy")


class RankFiles(Case):
    """What rank files say of themselves and of each other, and what lies beside them."""
    LLAMA = DENSE + "/tp2pp2"

    def edited(self, change, ranks=".", name=LLAMA):
        copy = self.copy(name)
        for path in sorted(copy.rglob("model_optim_rng.pt")):
            if re.search(ranks, str(path.relative_to(copy))):
                edit_archive(path, change)
        return copy

    def test_checkpoint_version(self):
        for version in (-1, 0.5, 1.5, 2.5, 9.0, float("inf")):
            copy = self.edited(lambda root: root.update(checkpoint_version=version))
            for command in (("verify", copy), ("hash", copy), ("reshard", copy, self.tmp / "out")):
                self.assertIn(f"checkpoint_version is {version:g}; 0, 1, 2 and 3 are known", self.refused(4, *command))
            shutil.rmtree(copy)
        for version in (0, 1.0):  # before query groups
            copy = self.edited(lambda root: root.update(checkpoint_version=version))
            self.assertIn("knows no query groups; args say 4 of them for 8 heads", self.finding("shape", copy)["message"])
            self.refused(6, "hash", copy)
            shutil.rmtree(copy)
        copy = self.edited(lambda root: root.update(checkpoint_version=2.0))
        self.assertEqual(digest(copy), digest(REFERENCE))

    def test_args_agree(self):
        for values in ({"num_layers": 8}, {"rotary_base": 5}, {"swiglu": False}, {"layernorm_epsilon": 1e-6}, {"untie_embeddings_and_output_weights": False}, {"vocab_size": None},
                       {"padded_vocab_size": 512}, {"pipeline_model_parallel_layout": "Ett|ttL"}, {"moe_layer_freq": [1, 0]}, {"world_size": 8}):
            copy = self.edited(lambda root: vars(root["args"]).update(values), "rank_01_001")
            found = self.finding("rank", copy)
            self.assertEqual(found["key"], "mp_rank_01_001/model_optim_rng.pt")
            self.assertTrue(found["message"].startswith(f"args.{next(iter(values))} is "), found)
            for command in (("hash", copy), ("reshard", copy, self.tmp / "out", "--tp", 1)):
                self.refused(6, *command)
            shutil.rmtree(copy)
        copy = self.edited(lambda root: vars(root["args"]).update(local_rank=77, master_port=1, virtual_pipeline_model_parallel_rank=3), "rank_01_001")
        self.assertEqual(digest(copy), digest(REFERENCE))

    def test_layouts_that_args_cannot_mean(self):
        for values in ({"pipeline_model_parallel_layout": "Ett|tt"}, {"decoder_first_pipeline_num_layers": 0}, {"virtual_pipeline_model_parallel_size": 3}):
            copy = self.edited(lambda root: vars(root["args"]).update(values))
            for command in (("verify", copy), ("reshard", copy, self.tmp / "out")):
                self.assertIn("args: ", self.refused(6, *command))
            shutil.rmtree(copy)

    def test_args_that_hold_themselves_or_share(self):
        def circle(root):
            layout = stand_in("megatron.core.transformer.pipeline_parallel_layer_layout", "PipelineParallelLayerLayout")()
            layout.state = {"layout": layout}
            root["args"].pipeline_model_parallel_layout = layout

        def stages(root):
            root["args"].pipeline_model_parallel_layout = [["t"] * 2000] * 2000
        for change, said in ((circle, "objects in one another"), (stages, "stages and layers")):
            copy = self.edited(change, "rank_00_000")
            self.assertIn("args.pipeline_model_parallel_layout: ", self.refused(4, "inspect", copy))
            self.assertIn(said, self.refused(4, "verify", copy))
            shutil.rmtree(copy)

        def shared(root):
            nothing = [[[{}] * 20_000] * 20_000] * 300  # values that add no text
            for name in ("rope_scaling_factor", "window_size", "rope_type"):
                setattr(root["args"], name, nothing)
            numbers = [float(i) for i in range(20_000)]
            root.update({f"x{i}": numbers for i in range(5_000)})
        copy = self.edited(shared, "rank_00_000")
        start = time.monotonic()
        self.refused(6, "hash", copy)
        self.assertLess(time.monotonic() - start, 20)

    def test_sizes_that_args_lack_are_written(self):
        def forget(root):
            for name in ("num_layers", "num_attention_heads", "ffn_hidden_size", "group_query_attention", "num_query_groups", "swiglu"):
                delattr(root["args"], name)
        copy = self.edited(forget)
        given = ("--num-layers", 4, "--num-attention-heads", 8, "--ffn-hidden-size", 128, "--num-query-groups", 4, "--swiglu")
        self.assertIn("--num-layers", self.refused(6, "hash", copy))
        for kind in ("mp_rank", "torch_dist"):
            self.ok("convert", copy, self.tmp / kind, "--to", kind, "--tp", 1, "-q", *given)
            self.assertEqual(digest(self.tmp / kind), digest(REFERENCE))

    def test_what_lies_beside(self):
        folder = "iter_0000010/mp_rank_01_001"
        for name in ("iter_0000010/mp_rank_00_000.bak", "iter_0000010/mp_rank_4294967296_000", "iter_0000010/mp_rank_"):
            copy = self.copy(self.LLAMA)
            shutil.copytree(copy / folder, copy / name)
            for command in (("verify", copy), ("hash", copy), ("reshard", copy, self.tmp / "out")):
                self.assertIn(name, self.refused(6, *command))
            shutil.rmtree(copy)
        copy = self.copy(self.LLAMA)
        shutil.copy(copy / folder / "model_optim_rng.pt", copy / folder / "model_rng.pt")
        self.assertIn("should hold one of them", self.refused(6, "verify", copy))
        (copy / folder / "model_optim_rng.pt").unlink()
        self.assertEqual(digest(copy), digest(REFERENCE))
        shutil.copytree(REFERENCE / "iter_0000010", copy / "iter_0000010", dirs_exist_ok=True)
        self.assertIn("should hold one checkpoint", self.refused(6, "hash", copy))

    def test_tensors_that_are_none_of_megatrons(self):
        copy = self.edited(lambda root: root.update(ema_model=dict(list(root["model"].items())[:3])), "rank_01_000")
        self.assertEqual(self.finding("unexpected", copy)["key"], "ema_model")
        self.refused(6, "reshard", copy, self.tmp / "out", "--tp", 1)
        status, out = run_json("reshard", copy, self.tmp / "out", "--tp", 1, "--drop", "ema_*")
        self.assertEqual((status, [d["why"] for d in out["dropped"] if d["key"] == "ema_model"]), (0, ["--drop"]))
        copy = self.tmp / "state"
        shutil.copytree(DATA / self.LLAMA, copy)
        edit_archive(copy / "iter_0000010/mp_rank_00_000/model_optim_rng.pt", lambda root: root.update(consumed={"steps": 4}))
        status, out = run_json("reshard", copy, self.tmp / "other", "--tp", 1)
        self.assertEqual((status, [d["why"] for d in out["dropped"] if d["key"] == "consumed"]), (0, ["belongs to the run, not to the weights"]))

    def test_optimizers(self):
        copy = self.copy("mcore_optim/legacy_float16opt_tp2pp1")
        self.ok("verify", copy)
        archive = Archive(copy / "iter_0000010/mp_rank_01/model_optim_rng.pt")
        path = archive.path
        infos = {i.filename: i for i in zipfile.ZipFile(path).infolist()}
        named = {t.args[0].pid[2] for t in archive.root["model"].values() if hasattr(t, "args") and t.args}
        record = next(i for n, i in infos.items() if "/data/" in n and n.rsplit("/", 1)[1] not in named and i.file_size)
        data = bytearray(path.read_bytes())
        start = record.header_offset + 30 + sum(struct.unpack_from("<HH", data, record.header_offset + 26))
        data[start + record.file_size // 2] ^= 1
        path.write_bytes(bytes(data))
        self.assertIn("mp_rank_01/model_optim_rng.pt: CRC-32", self.finding("checksum", copy)["message"])
        self.ok("reshard", copy, self.tmp / "out", "--tp", 1, "--weights-only", "-q")  # reads no optimizer

    def test_optimizers_beside(self):
        for name in ("distrib_optim.pt", "optim.pt", "layer_wise_optimizer_0.pt"):
            copy = self.copy(self.LLAMA)
            beside = copy / "iter_0000010/mp_rank_00_000" / name
            shutil.copy(DATA / "torch/tensor.pt", beside)
            self.ok("verify", copy)
            self.assertIn("--weights-only", self.refused(4, "reshard", copy, self.tmp / "out", "--tp", 1))
            status, out = run_json("reshard", copy, self.tmp / name, "--tp", 1, "--weights-only")
            self.assertEqual((status, [d["key"] for d in out["dropped"] if "mp_rank" in d["key"]]), (0, [f"mp_rank_00_000/{name}"]))
            data = beside.read_bytes()
            for broken in (b"", b"garbage", data[:-30]):
                beside.write_bytes(broken)
                self.assertIn(name, self.finding("checksum", copy)["message"])
            record = next(i for i in zipfile.ZipFile(DATA / "torch/tensor.pt").infolist() if i.filename.endswith("data/0"))
            start = record.header_offset + 30 + sum(struct.unpack_from("<HH", data, record.header_offset + 26))
            beside.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1:])
            self.assertIn(name, self.finding("checksum", copy)["message"])
            self.ok("hash", copy)
            shutil.rmtree(copy)

    def test_extra_states(self):
        def say(text):
            def change(root):
                for key in [k for k in root["model"] if k.endswith("linear_proj._extra_state")]:
                    root["model"][key] = text
            return change
        copy = self.edited(say("one"), "rank_0._000")
        edit_archive(copy / "iter_0000010/mp_rank_01_000/model_optim_rng.pt", say("two"))
        status, out = run_json("reshard", copy, self.tmp / "out", "--tp", 1)
        self.assertEqual((status, [d["key"] for d in out["dropped"] if "_extra_state" in d["key"]]),
                         (0, [f"mp_rank_01_000/decoder.layers.{i}.self_attention.linear_proj._extra_state" for i in (0, 1)]))
        status, out = run_json("convert", copy, self.tmp / "hf", "--to", "hf")
        self.assertTrue(any(d["key"] == "_extra_state" and d["why"].startswith("2 of them") for d in out["dropped"]), out["dropped"])

    def test_iteration(self):
        for name in (self.LLAMA, "mcore/llama_untied_bf16/tp2pp2"):
            copy = self.copy(name)
            tracker = copy / "latest_checkpointed_iteration.txt"
            tracker.write_text("  10 \n")  # as int() takes it
            self.assertEqual(digest(copy), digest(REFERENCE))
            tracker.unlink()
            self.assertIn("holds iter_0000010 but no latest_checkpointed_iteration.txt", self.refused(4, "hash", copy))
            for other in ("iter_9999999", "iter_10000000"):
                (copy / other).mkdir()
            self.assertIn("holds iter_10000000 but", self.refused(4, "hash", copy))
            for other in ("iter_9999999", "iter_10000000"):
                (copy / other).rmdir()
            self.ok("hash", copy, "--iteration", 10)
            self.refused(3, "hash", copy, "--iteration", 11)
            (copy / "iter_0000010").rename(copy / "iter_0000020")
            for path in (copy, copy / "iter_0000020", f"{copy}/iter_0000020/"):
                more = ("--iteration", 20) if path == copy else ()
                status, out = run_json("verify", path, *more)
                said = [f["message"] for f in out["findings"] if f["severity"] == "warning"]
                self.assertEqual((status, said), (0, ["holds iteration 10 by its own state, which is followed"]))
                status, out = run_json("reshard", path, self.tmp / "out", "--tp", 1, "--force", *more)
                self.assertEqual((status, out["notes"]), (0, [f"iter_0000020 {said[0]}"]))
                self.assertTrue((self.tmp / "out/iter_0000010").is_dir())
            (copy / "iter_0000020").rename(self.tmp / "elsewhere")
            tracker.write_text("10")
            (copy / "iter_0000010").symlink_to(self.tmp / "elsewhere")
            self.assertIn("leads out", self.refused(4, "hash", copy))
            (copy / "iter_0000010").unlink()
            (self.tmp / "elsewhere").rename(copy / "there")
            (copy / "iter_0000010").symlink_to("there")
            self.assertEqual(digest(copy), digest(REFERENCE))


class Junit(Case):
    def cases(self, *args):
        run("verify", *args, "--junit", self.tmp / "junit.xml", "-q")
        suite = xml.etree.ElementTree.parse(self.tmp / "junit.xml").getroot()
        self.assertEqual(int(suite.get("tests")), len(suite.findall("testcase")))
        self.assertEqual(int(suite.get("failures")), len(suite.findall("testcase/failure")))
        return {case.get("name"): case.find("failure") for case in suite}

    def test_sound(self):
        self.assertEqual(set(self.cases(REFERENCE).values()), {None})

    def test_a_failure_is_under_its_rule(self):
        cases = self.cases(DATA / "hostile/mega_layernorm_replica_differs")
        self.assertIn("ULP", cases["replica"].get("message"))
        self.assertEqual([rule for rule, failure in cases.items() if failure is not None], ["replica"])

    def test_keys_of_strangers_stay_xml(self):
        key = 'a<b>&"\'\x01\n]]>\ufffe\u00e9'

        def add(root):
            root["model"][key] = next(v for k, v in root["model"].items() if k.endswith(".weight"))
        copy = self.copy(DENSE + "/tp1pp1")
        edit_archive(next(copy.rglob("*.pt")), add)
        failure = self.cases(copy)["unexpected"]
        self.assertIn('a<b>&"\'?', failure.text)
        self.assertIn("\u00e9", failure.text)


if __name__ == "__main__":
    unittest.main()
