"""validate against genuine reference logits: families, layouts, precisions, token files, reports and what must fail."""
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, run, run_json  # noqa: E402
from torch_edit import edit_archive  # noqa: E402

LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"
REFERENCES = DATA / "references"
LLAMA_REFERENCE = REFERENCES / "mcore_llama_untied_bf16.safetensors"
DEEPSEEK = next((DATA / "pairs/deepseek_v3_mtp_bf16").glob("tp*"))
DEEPSEEK_REFERENCE = REFERENCES / "pairs_deepseek_v3_mtp_bf16.safetensors"
FAMILIES = sorted(f for f in (DATA / "hf").iterdir() if (f / "reference.safetensors").exists())


def tensors_of(path):
    """Name → (offset in the file, record) of a safetensors file."""
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (8 + size + record["data_offsets"][0], record) for name, record in header.items()}


def rewritten(source, target, names={}, emptied=()):
    """A safetensors file with the same data under other names; those that become None are left out, those emptied lose their rows."""
    raw = pathlib.Path(source).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    data, body, header = raw[8 + size:], b"", {}
    for name, record in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__" and (name := names.get(name, name)):
            begin, end = record["data_offsets"]
            if name in emptied:
                end, record = begin, record | {"shape": [0, *record["shape"][1:]]}
            header[name] = record | {"data_offsets": [len(body), len(body) + end - begin]}
            body += data[begin:end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(target).write_bytes(struct.pack("<Q", len(text)) + text + body)


def patch(path, offset, data):
    raw = bytearray(pathlib.Path(path).read_bytes())
    raw[offset:offset + len(data)] = data
    pathlib.Path(path).write_bytes(raw)


def numbers(path, name, change):
    """Rewrites a tensor's numbers with change(list), which alters it."""
    offset, record = tensors_of(path)[name]
    begin, end = record["data_offsets"]
    form = f"<{(end - begin) // {'I64': 8, 'F32': 4}[record['dtype']]}{'q' if record['dtype'] == 'I64' else 'f'}"
    values = list(struct.unpack(form, pathlib.Path(path).read_bytes()[offset:offset + end - begin]))
    change(values)
    patch(path, offset, struct.pack(form, *values))


class Reference(Case):
    def near(self, checkpoint, reference, *more):
        status, out = run_json("validate", checkpoint, "--reference", reference, *more)
        self.assertEqual(status, 0, out["checks"])
        self.assertLess(out["reference"]["max_abs_logits"], 1e-4)
        self.assertLess(out["reference"]["max_abs_loss"], 1e-4)
        self.assertLess(out["reference"]["mean_abs_loss"], 2e-5)
        return out

    def test_keys(self):
        out = self.near(LLAMA, LLAMA_REFERENCE)
        for key in ("ok", "device", "family", "layout", "tokens", "loss", "loss_true_vocab", "perplexity", "tokens_per_second", "seconds", "reference", "mtp", "findings"):
            self.assertIn(key, out)
        self.assertEqual((out["ok"], out["device"], out["tokens"], out["layout"]["tp"], out["mtp"]), (True, "cpu", 32, 2, []))
        self.assertIn("load", out["seconds"])
        self.assertIn("forward", out["seconds"])

    def test_families(self):
        for folder in FAMILIES:
            with self.subTest(folder.name):
                self.near(folder, folder / "reference.safetensors")

    def test_learned_positions(self):
        self.near(DATA / "mcore/gpt_tied_bf16_div128/tp2pp2", REFERENCES / "mcore_gpt_tied_bf16_div128.safetensors")

    def test_mtp_and_single_steps(self):
        out = self.near(DEEPSEEK, DEEPSEEK_REFERENCE)
        depth = out["mtp"][0]
        self.assertEqual(depth["depth"], 0)
        self.assertAlmostEqual(depth["scaled_loss"], 0.1 * depth["loss"], places=6)
        self.assertLess(max(depth["max_abs_logits"], depth["max_abs_loss"], depth["step"]["max_abs_hidden"], depth["step"]["max_abs_logits"]), 1e-4)

    def test_a_reference_with_more_than_the_model(self):
        status, out = run_json("validate", DATA / "hf/deepseek_v3_mtp_bf16", "--reference", DEEPSEEK_REFERENCE, "--drop", "mtp.*")
        self.assertEqual((status, out["mtp"]), (1, []))
        self.assertEqual([check["name"] for check in out["checks"] if not check["ok"]], ["reference mtp.0"])
        one = self.tmp / "one.safetensors"
        for name in ("mtp.1.logits", "mtp.99.logits", "mtp.00.loss", "mtp_step.18446744073709551616.logits"):
            rewritten(DEEPSEEK_REFERENCE, one, {"mtp.0.logits" if "logits" in name else "mtp.0.loss": name})
            status, out = run_json("validate", DEEPSEEK, "--reference", one)
            self.assertEqual((status, [check["name"] for check in out["checks"] if not check["ok"]]), (1, [f"reference mtp.{name.split('.')[1]}"]))

    def test_steps_that_cannot_be_compared(self):
        one, step = self.tmp / "one.safetensors", "mtp_step.0."
        rewritten(DEEPSEEK_REFERENCE, one, {})
        self.near(DEEPSEEK, one)
        rewritten(DEEPSEEK_REFERENCE, one, emptied=(step + "in_hidden", step + "next_token_ids"), names={step + name: None for name in ("position_ids", "hidden", "logits")})
        self.assertIn("next_token_ids is empty", self.refused(4, "validate", DEEPSEEK, "--reference", one))
        for names in ({step + "in_hidden": None}, {step + "next_token_ids": None}, {step + "logits": step + "hidden", step + "hidden": step + "logits"}, {step + "hidden": step + "position_ids", step + "position_ids": None}):
            rewritten(DEEPSEEK_REFERENCE, one, names)
            self.refused(4, "validate", DEEPSEEK, "--reference", one)
        rewritten(DEEPSEEK_REFERENCE, one, {})
        offset, _ = tensors_of(one)[step + "next_token_ids"]
        patch(one, offset, struct.pack("<q", 1 << 40))
        self.refused(6, "validate", DEEPSEEK, "--reference", one)

    def test_ranks(self):
        for checkpoint, reference in ((LLAMA, LLAMA_REFERENCE), (DEEPSEEK, DEEPSEEK_REFERENCE), (FAMILIES[-1], FAMILIES[-1] / "reference.safetensors")):
            for tp, pp in ((2, 2), (4, 1), (1, 4), (3, 2)):
                with self.subTest(f"{checkpoint.name} tp{tp} pp{pp}"):
                    self.near(checkpoint, reference, "--tp", tp, "--pp", pp)
        self.refused(5, "validate", LLAMA, "--pp", 5)

    def test_same_bits(self):
        losses = {run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE, *more)[1]["loss_true_vocab"]
                  for more in ((), (), ("--threads", 1), ("--threads", 7), ("--mem-limit", "1KB"))}
        for other in ("llama_untied_bf16/tp1pp1", "llama_untied_bf16/tp4pp1", "llama_nonhomogeneous_bf16/tp2pp2"):
            losses.add(run_json("validate", DATA / "mcore" / other, "--reference", LLAMA_REFERENCE)[1]["loss_true_vocab"])
        self.assertEqual(len(losses), 1, losses)

    def test_bf16(self):
        status, out = run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--compute", "bf16")
        self.assertEqual(status, 0, out["checks"])
        self.assertGreater(out["reference"]["max_abs_logits"], 1e-3)

    def test_fp8(self):
        one = run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--compute", "fp8")
        self.assertEqual(one[0], 0, one[1]["checks"])
        bf16 = run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--compute", "bf16")[1]
        self.assertGreater(one[1]["reference"]["mean_abs_logits"], 3 * bf16["reference"]["mean_abs_logits"])
        for a, b in zip(one[1]["weights"], bf16["weights"], strict=True):  # looked at as they are stored
            self.assertEqual(a["max_abs"], b["max_abs"])
            self.assertAlmostEqual(a["rms"] / b["rms"], 1, delta=1e-5)
        for grid in (("--pp", 2), ("--tp", 2), ("--tp", 2, "--pp", 2), ("--threads", 1)):
            status, out = run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--compute", "fp8", *grid)
            self.assertEqual(status, 0, out["checks"])
            if "--tp" not in grid:
                self.assertEqual(out["loss"], one[1]["loss"])
        for family in ("qwen3_moe_bf16", "gpt_oss_bf16", "deepseek_v3_mtp_bf16", "gpt2_tied_f32"):
            status, out = run_json("validate", DATA / "hf" / family, "--reference", DATA / "hf" / family / "reference.safetensors", "--compute", "fp8", "--tp", 2)
            self.assertEqual(status, 0, out["checks"])
        self.assertEqual(run("validate", DATA / "mcore/gpt_tied_bf16_div128/tp2pp2", "--reference", LLAMA_REFERENCE, "--compute", "fp8")[0], 1)
        self.assertEqual(run("validate", LLAMA, "--compute", "fp4")[0], 2)

    def test_another_reference_fails(self):
        status, out, _ = run("validate", DATA / "mcore/gpt_tied_bf16_div128/tp2pp2", "--reference", LLAMA_REFERENCE)
        self.assertEqual(status, 1)
        self.assertIn("FAIL", out)

    def test_a_small_change_fails(self):
        source = DATA / "hf/llama_untied_bf16"
        copy = self.tmp / "copy"
        shutil.copytree(source, copy)
        config = json.loads((copy / "config.json").read_text())
        config["rms_norm_eps"] = 1e-6
        (copy / "config.json").write_text(json.dumps(config))
        self.assertEqual(run("validate", copy, "--reference", source / "reference.safetensors")[0], 1)

    def test_a_number_out_of_bounds_bounds_nothing(self):
        one = self.tmp / "one.safetensors"
        for checkpoint, reference, name in ((LLAMA, LLAMA_REFERENCE, "logits"), (DEEPSEEK, DEEPSEEK_REFERENCE, "mtp.0.logits")):
            rewritten(reference, one)
            numbers(one, name, lambda values: values.__setitem__(7, float("-inf")))
            status, out = run_json("validate", checkpoint, "--reference", one)
            self.assertEqual(status, 1, out["checks"])
            self.assertNotIn("at most inf", str(out["checks"]))
        copy = self.copy("hf/gemma2_tied_bf16")  # a model of which one matrix is a million times too large, in bf16 judged by means
        file = copy / "model.safetensors"
        offset, record = tensors_of(file)["model.norm.weight"]
        patch(file, offset, b"\x80\x4b" * 3)
        self.assertEqual(run("validate", copy, "--reference", copy / "reference.safetensors", "--compute", "bf16")[0], 1)
        rewritten(DATA / "hf/qwen3_moe_bf16/reference.safetensors", one)
        numbers(one, "logits", lambda values: values.__setitem__(7, 1000.0))
        self.assertEqual(run("validate", DATA / "hf/llama_untied_bf16", "--reference", one, "--compute", "bf16")[0], 1)

    def test_nothing_to_compare(self):
        one = self.tmp / "one.safetensors"
        rewritten(LLAMA_REFERENCE, one, {"logits": None, "loss": None})
        status, out = run_json("validate", LLAMA, "--reference", one)
        self.assertEqual(status, 1)
        self.assertIn("nothing was compared", out["checks"][-1]["figure"])
        size, header = struct.unpack("<Q", (raw := LLAMA_REFERENCE.read_bytes())[:8])[0], json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
        header["logits"] |= {"shape": [2, 16, 0], "data_offsets": [header["logits"]["data_offsets"][0]] * 2}
        kept = {name: record for name, record in header.items() if name in ("input_ids", "labels")}
        body = b"".join(raw[8 + size:][slice(*record["data_offsets"])] for record in kept.values())
        for i, record in enumerate(kept.values()):
            record["data_offsets"] = [256 * i, 256 * (i + 1)]
        text = json.dumps(kept | {"logits": header["logits"] | {"data_offsets": [512, 512]}}).encode()
        one.write_bytes(struct.pack("<Q", len(text)) + text + body)
        self.assertIn("logits has no columns", self.refused(4, "validate", LLAMA, "--reference", one))

    def test_labels_that_are_left_out(self):
        one = self.tmp / "one.safetensors"
        rewritten(LLAMA_REFERENCE, one)
        for name, value in (("labels", -100), ("loss", 0)):
            numbers(one, name, lambda values: values.__setitem__(slice(0, 5), [value] * 5))
        self.near(LLAMA, one)
        numbers(one, "labels", lambda values: values.__setitem__(slice(None), [-100] * len(values)))
        self.assertIn("negative", self.refused(4, "validate", LLAMA, "--reference", one))

    def test_labels_and_positions_that_count_less(self):
        one = self.tmp / "one.safetensors"
        rewritten(LLAMA_REFERENCE, one, {"loss": None})
        numbers(one, "labels", lambda values: values.__setitem__(3, 253))
        numbers(one, "position_ids", lambda values: values.__setitem__(3, 5))
        _, before = run_json("validate", LLAMA, "--reference", LLAMA_REFERENCE)
        status, out = run_json("validate", LLAMA, "--reference", one)
        self.assertEqual(status, 0, out["checks"])
        self.assertRegex(str(out["notes"]), "1 labels of the reference.*position_ids")
        self.assertGreater(abs(out["loss"] - out["loss_true_vocab"]), abs(before["loss"] - before["loss_true_vocab"]))
        self.assertEqual(before["notes"], [])

    def test_no_reference_file(self):
        self.refused(3, "validate", LLAMA, "--reference", self.tmp / "none")
        self.refused(4, "validate", LLAMA, "--reference", DATA / "hf/gemma2_tied_bf16/model.safetensors")


class Against(Case):
    def test_same_weights(self):
        status, out = run_json("validate", DATA / "pairs/qwen3_moe_bf16/tp1pp1", "--against", DATA / "hf/qwen3_moe_bf16")
        self.assertEqual(status, 0, out["checks"])

    def test_where_they_part(self):
        copy = self.copy("hf/qwen3_moe_bf16")
        file = copy / "model.safetensors"
        offset, _ = tensors_of(file)["model.layers.2.self_attn.o_proj.weight"]
        patch(file, offset, b"\x80\x3f")
        status, out, _ = run("validate", copy, "--against", DATA / "hf/qwen3_moe_bf16")
        self.assertEqual(status, 1)
        self.assertIn("first part ways at layer 2", out)


    def test_where_mtp_layers_part(self):
        copy = self.copy("hf/deepseek_v3_mtp_bf16")
        file = next(f for f in sorted(copy.glob("*.safetensors")) if "model.layers.4.eh_proj.weight" in tensors_of(f))
        offset, _ = tensors_of(file)["model.layers.4.eh_proj.weight"]
        patch(file, offset, b"\x80\x3f")
        status, out, _ = run("validate", copy, "--against", DATA / "hf/deepseek_v3_mtp_bf16")
        self.assertEqual(status, 1)
        self.assertIn("first part ways at mtp 0", out)

    def test_mtp_layers_on_one_side(self):
        copy = self.copy("hf/deepseek_v3_mtp_bf16")
        file = copy / "model.safetensors"
        rewritten(file, file, {name: None for name in tensors_of(file) if name.startswith("model.layers.4.")})
        whole = DATA / "hf/deepseek_v3_mtp_bf16"
        for a, b in ((copy, whole), (whole, copy)):
            status, out, _ = run("validate", a, "--against", b)
            self.assertEqual(status, 1, out)
            self.assertIn("MTP layers here", out)
        self.ok("validate", copy, "--against", whole, "--drop", "mtp.*")

    def test_sizes_of_the_vocabulary(self):
        source = DATA / "hf/llama_untied_bf16"
        for size in (0, -1, "99999999999999999999", "x"):
            self.assertIn("--vocab-size", self.refused(2, "validate", source, "--vocab-size", size))
        self.assertIn("--vocab-size 251", self.refused(6, "validate", source, "--vocab-size", 251))
        copy = self.copy("hf/llama_untied_bf16")
        config = json.loads((copy / "config.json").read_text())
        for size in (1, 7, 249, 251, 2**31):
            (copy / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
            self.assertIn(f"config.json says a vocabulary of {size}", self.refused(6, "validate", copy))
            self.finding("padding", copy)


class Tokens(Case):
    def test_formats_agree(self):
        ids = [3, 1, 4, 1, 5, 9, 2, 6]
        (self.tmp / "ids.txt").write_text(" ".join(map(str, ids)))
        header = "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 8), }".ljust(117) + "\n"
        (self.tmp / "ids.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + struct.pack("<8i", *ids))
        meta = json.dumps({"input_ids": {"dtype": "I64", "shape": [8], "data_offsets": [0, 64]}}).encode()
        (self.tmp / "ids.safetensors").write_bytes(struct.pack("<Q", len(meta)) + meta + struct.pack("<8q", *ids))
        results = [run_json("validate", LLAMA, "--tokens", self.tmp / f"ids.{kind}") for kind in ("txt", "npy", "safetensors")]
        self.assertEqual({status for status, _ in results}, {0})
        self.assertEqual(len({out["loss"] for _, out in results}), 1)
        self.assertEqual(results[0][1]["tokens"], 7)
        self.assertIsNone(results[0][1]["reference"])

    def test_bad_tokens(self):
        (self.tmp / "ids.txt").write_text("1 2 99999")
        self.refused(6, "validate", LLAMA, "--tokens", self.tmp / "ids.txt")
        (self.tmp / "ids.txt").write_text("1 two 3")
        self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.txt")
        (self.tmp / "ids.txt").write_text("1")
        self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.txt")
        for ids, word in (("1 2 251", "token 251 is outside the vocabulary of 250"), ("1 251 2", "token 251"), ("1 2 -1", "token -1")):
            (self.tmp / "ids.txt").write_text(ids)
            self.assertIn(word, self.refused(6, "validate", LLAMA, "--tokens", self.tmp / "ids.txt"))
        (self.tmp / "ids.txt").write_text("1 200 201 202")
        self.refused(6, "validate", DATA / "hf/llama_untied_bf16", "--vocab-size", 7, "--tokens", self.tmp / "ids.txt")
        header = b"{'descr': '<u8', 'fortran_order': False, 'shape': (3,), }\n"
        (self.tmp / "ids.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack("<3Q", 1, 2, 2**64 - 1))
        self.assertIn("18446744073709551615", self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.npy"))
        for shape in ("(9223372036854775807,)", "(4611686018427387904, 4)", "(-8,)", "(0,)", "()", "(9,)"):
            header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
            (self.tmp / "ids.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack("<8q", *range(8)))
            self.assertIn("ids.npy", self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.npy"))

    def test_a_row_without_a_token_two_ahead(self):
        (self.tmp / "ids.txt").write_text("1 2")
        status, out = run_json("validate", DEEPSEEK, "--tokens", self.tmp / "ids.txt")
        self.assertEqual((status, out["mtp"][0]["loss"]), (0, None), out["checks"])

    def test_only_the_ids_of_a_file_are_read(self):
        """Whatever else it holds: these files are larger than any memory."""
        huge = 1 << 42

        def write(entries, name="ids.safetensors"):
            text = json.dumps({key: {"dtype": "U8", "shape": shape, "data_offsets": at} for key, shape, at in entries}).encode()
            path = self.tmp / name
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text + bytes([1, 2, 3, 4]))
                file.truncate(8 + len(text) + max(at[1] for _, _, at in entries))
            return path

        beside = write([("input_ids", [4], [0, 4]), ("weight", [huge], [4, 4 + huge])])
        self.assertEqual(run_json("validate", LLAMA, "--tokens", beside)[1]["tokens"], 3)
        said = self.refused(4, "validate", LLAMA, "--tokens", write([("weight", [huge // 2], [0, huge // 2]), ("more", [huge // 2], [huge // 2, huge])]))
        self.assertIn("should hold input_ids", said)
        self.assertIn("at most 4194304", self.refused(4, "validate", LLAMA, "--tokens", write([("weight", [2, huge // 2], [0, huge])])))
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({huge},), }}\n".encode()
        with open(self.tmp / "ids.npy", "wb") as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
            file.truncate(file.tell() + huge)
        self.assertIn("at most 4194304", self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.npy"))
        (self.tmp / "ids.txt").write_text("1 " * ((4 << 20) + 1))
        self.assertIn("at most 4194304", self.refused(4, "validate", LLAMA, "--tokens", self.tmp / "ids.txt"))

    def test_texts_name_their_files(self):
        copy = self.tmp / "model"
        shutil.copytree(DATA / "hf/llama_untied_bf16", copy)
        shutil.copy(DATA / "tokenizers/gpt2.json", copy / "tokenizer.json")
        text = self.tmp / "text.txt"
        text.write_bytes(b"\xff")
        self.assertIn(f"{text}: is not UTF-8", self.refused(4, "validate", copy, "--text", text))
        with open(text, "wb") as file:
            file.truncate(1 << 40)
        self.assertIn(str(text), self.refused(4, "validate", copy, "--text", text))

    def test_rows_of_a_nested_list(self):
        (self.tmp / "ids.txt").write_text("[[1, 2, 3], [4, 5, 6]]")
        self.assertEqual(run_json("validate", LLAMA, "--tokens", self.tmp / "ids.txt")[1]["tokens"], 4)

    def test_built_in_tokens_and_max_loss(self):
        status, out = run_json("validate", LLAMA)
        self.assertEqual((status, out["ok"]), (0, True))
        self.assertEqual(run("validate", LLAMA, "--max-loss", out["loss_true_vocab"] + 0.01)[0], 0)
        self.assertEqual(run("validate", LLAMA, "--max-loss", out["loss_true_vocab"] - 0.01)[0], 1)
        self.refused(2, "validate", LLAMA, "--max-loss", "nan")
        for sizes in (("--mem-limit", "1.2.3MB"), ("--device-mem-limit", "x"), ("--num-layers", "99999999999999999999")):
            self.refused(2, "validate", LLAMA, *sizes)


class Findings(Case):
    def test_nonfinite_weight(self):
        copy = self.copy("hf/gemma2_tied_bf16")
        file = copy / "model.safetensors"
        offset, _ = tensors_of(file)["model.layers.1.mlp.up_proj.weight"]
        patch(file, offset, b"\xc0\x7f")
        status, out = run_json("validate", copy)
        self.assertEqual((status, out["ok"]), (1, False))
        self.assertEqual([(f["rule"], f["key"]) for f in out["findings"]], [("nonfinite", "layers.1.mlp.up.weight")])

    def test_a_copy_of_the_head_without_rows(self):
        for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.4.embed_tokens.weight"):
            copy = self.tmp / name
            shutil.copytree(DATA / "hf/deepseek_v3_mtp_bf16", copy)
            file = next(f for f in sorted(copy.glob("model*.safetensors")) if name in tensors_of(f))
            rewritten(file, file, emptied=(name,))
            self.assertEqual(self.finding("shape", copy)["key"], name)
            self.refused(6, "validate", copy)

    def test_constant_matrix(self):
        copy = self.copy("hf/gemma2_tied_bf16")
        file = copy / "model.safetensors"
        offset, record = tensors_of(file)["model.layers.1.mlp.up_proj.weight"]
        patch(file, offset, bytes(record["data_offsets"][1] - record["data_offsets"][0]))
        status, out = run_json("validate", copy)
        self.assertEqual(status, 0)
        self.assertIn(("constant", "warning"), [(f["rule"], f["severity"]) for f in out["findings"]])

    def test_a_layer_whose_weights_are_much_larger(self):
        copy = self.copy("hf/deepseek_v3_mtp_bf16")
        file = next(f for f in sorted(copy.glob("*.safetensors")) if "model.layers.2.self_attn.o_proj.weight" in tensors_of(f))
        offset, record = tensors_of(file)["model.layers.2.self_attn.o_proj.weight"]
        data = bytearray(file.read_bytes())
        end = offset + record["data_offsets"][1] - record["data_offsets"][0]
        for at in range(offset, end, 2):  # bf16: five more in the exponent is 32 times the number
            bits = int.from_bytes(data[at:at + 2], "little")
            if bits & 0x7F80:
                data[at:at + 2] = (bits + (5 << 7)).to_bytes(2, "little")
        file.write_bytes(data)
        _, out = run_json("validate", copy)
        self.assertEqual([(f["rule"], f["severity"], f["key"]) for f in out["findings"]], [("norm", "warning", "layers.2.attention.out.weight")])
        _, before = run_json("validate", DATA / "hf/deepseek_v3_mtp_bf16")
        self.assertEqual([layer["layer"] for layer in before["weights"]], [0, 1, 2, 3])
        self.assertEqual(before["findings"], [])
        self.assertGreater(out["weights"][2]["rms"], 2 * before["weights"][2]["rms"])

    def test_what_the_model_lacks_or_has_too_much(self):
        copy = self.copy("hf/llama_untied_bf16")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "frobnicator"}))
        self.assertNotEqual(run("validate", copy)[0], 0)
        (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "spiral"}}))
        self.refused(4, "validate", copy)
        llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        for field in llama3:
            if field != "rope_type":
                (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": llama3 | {field: -1}}))
                self.assertIn(field, self.refused(4, "validate", copy))
        (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": {k: v for k, v in llama3.items() if k != "factor"}}))
        self.assertIn("lacks factor", self.refused(4, "validate", copy))
        # transformers takes the older name where both are there.
        (copy / "config.json").write_text(json.dumps(config | {"rope_scaling": llama3}))
        self.assertEqual(run("validate", copy, "--reference", copy / "reference.safetensors")[0], 1)

    def test_sizes_that_are_none(self):
        for name, change, status, word in (("llama_untied_bf16", {"hidden_size": 1.5}, 4, "config.json: hidden_size is 1.5"), ("llama_untied_bf16", {"head_dim": -8}, 4, "config.json: head_dim is -8"),
                                           ("llama_untied_bf16", {"intermediate_size": "x"}, 4, 'config.json: intermediate_size is "x"'), ("llama_untied_bf16", {"hidden_size": 2**64 - 1}, 4, "hidden_size"),
                                           ("gpt2_tied_f32", {"n_head": 2**62}, 4, "64 bits"), ("gpt2_tied_f32", {"n_head": 2**61 + 5}, 4, "64 bits")):
            with self.subTest(f"{name} {change}"):
                copy = self.tmp / "copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(DATA / "hf" / name, copy)
                config = json.loads((copy / "config.json").read_text())
                (copy / "config.json").write_text(json.dumps(config | change))
                self.assertIn(word, self.refused(status, "validate", copy))
        self.assertIn("the command line says 3", self.refused(6, "validate", DATA / "hf/llama_untied_bf16", "--num-layers", 3))

    def test_args_that_are_no_numbers(self):
        for name in ("rotary_base", "softmax_scale", "vocab_size", "kv_channels", "multi_latent_attention", "use_rope_scaling"):
            copy = self.tmp / name
            shutil.copytree(next((DATA / "legacy/llama_untied_bf16").iterdir()), copy)
            for file in copy.rglob("model_optim_rng.pt"):
                edit_archive(file, lambda root: setattr(root["args"], name, "x"))
            self.assertIn(f"args.{name}: is no number", self.refused(4, "validate", copy))

    def test_config_that_ended_the_process_or_was_not_understood(self):
        for name, change, word in (("deepseek_v3_mtp_bf16", {"num_experts_per_tok": 1}, "num_experts_per_tok"), ("qwen3_moe_bf16", {"is_causal": False}, "is_causal"), ("gpt_oss_bf16", {"layer_types": ["full_attention"] * 9}, "layer_types"), ("gemma2_tied_bf16", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
                                   ("qwen3_moe_bf16", {"decoder_sparse_step": 0}, "decoder_sparse_step"), ("llama_untied_bf16", {"head_dim": 2**31}, "")):
            copy = self.tmp / name
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(DATA / "hf" / name, copy)
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps(config | change))
            self.assertIn(word, self.refused(6 if name.startswith("llama") else 4, "validate", copy))

    def test_more_experts_than_can_be(self):
        copy = self.copy("legacy/moe_bf16")
        file = sorted(copy.rglob("model_optim_rng.pt"))[0]
        edit_archive(file, lambda root: setattr(root["args"], "num_experts", 1_000_000))
        self.assertIn("num_experts", self.refused(4, "validate", file.parent.parent.parent))

    def test_reports(self):
        html, junit = self.tmp / "report.html", self.tmp / "report.xml"
        self.ok("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--html", html, "--junit", junit)
        self.assertRegex(html.read_text(), re.compile("<svg.*polyline", re.S))
        self.assertNotIn("http", html.read_text())
        self.assertIn('failures="0"', junit.read_text())

    def test_reports_are_whole_or_not_at_all(self):
        page = self.tmp / "report.html"
        page.write_text("<html>of yesterday")
        command = 'ulimit -f 2; "$0" "$@"'
        done = subprocess.run(["bash", "-c", command, SHARDKIT, "validate", LLAMA, "--html", page], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout.splitlines()[-1]), (7, "sound"))  # the verdict is told all the same
        self.assertEqual(done.stderr, f"shardkit: error: {page}: cannot write: File too large\n")
        self.assertEqual((page.read_text(), [f.name for f in self.tmp.iterdir()]), ("<html>of yesterday", [page.name]))
        link = self.tmp / "link.html"
        link.symlink_to(page.name)
        self.ok("validate", LLAMA, "--html", link)
        self.assertTrue(link.is_symlink())
        self.assertIn("</html>", page.read_text())
        self.assertIn("</testsuite>", self.ok("validate", LLAMA, "-q", "--junit", "/dev/stdout"))

    def test_reports_that_cannot_be_are_refused_before_the_work(self):
        checkpoint = self.copy("hf/llama_untied_bf16")
        before = {f.name: f.read_bytes() for f in checkpoint.iterdir()}
        for status, args in ((7, ("--html", self.tmp / "none/x.html")), (7, ("--junit", self.tmp)), (2, ("--html", self.tmp / "x", "--junit", self.tmp / "copy/../x")),
                             (2, ("--html", checkpoint / "config.json")), (2, ("--junit", next(checkpoint.glob("model*.safetensors"))))):
            self.assertIn(str(args[-1]), self.refused(status, "validate", checkpoint, *args))
        self.assertIn("a file of the checkpoint", self.refused(2, "verify", checkpoint, "--junit", checkpoint / "config.json"))
        self.assertEqual({f.name: f.read_bytes() for f in checkpoint.iterdir()}, before)
        for _ in range(2):  # a report beside the weights is replaced by the next
            self.ok("validate", checkpoint, "--html", checkpoint / "report.html", "-q")


if __name__ == "__main__":
    unittest.main()
