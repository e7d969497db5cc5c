"""Weights stored as small numbers with scales: FP8 in blocks and MXFP4, to numbers in every format, or carried as they are."""
import json
import math
import pathlib
import shutil
import struct
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, digest, run_json  # noqa: E402

HF = DATA / "hf"
BLOCK = 32
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def tensors(folder):
    """Key → dtype, shape, bytes, of all .safetensors of a folder."""
    out = {}
    for file in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        for key, entry in json.loads(raw[8 : 8 + size]).items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                out[key] = entry["dtype"], entry["shape"], raw[8 + size + begin : 8 + size + end]
    return out


def write(folder, held, config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header, at = {}, 0
    for key, (dtype, shape, raw) in held.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in held.values()))
    return folder


def plain(folder):
    """Its tensors, with the selection bias as every target writes it."""
    return {key: widened(value, "F32") if key.endswith("e_score_correction_bias") else value for key, value in tensors(folder).items()}


def e4m3(code):
    exponent, mantissa = code >> 3 & 15, code & 7
    value = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    return -value if code & 128 else value


def packed(values, dtype):
    """Of values that the type holds exactly."""
    if dtype == "F32":
        return struct.pack(f"<{len(values)}f", *values)
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    raw = struct.pack(f"<{len(values)}f", *values)
    assert not any(raw[0::4]) and not any(raw[1::4])
    return b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))


def widened(value, dtype):
    """A tensor of BF16 as the wider or other type."""
    own, shape, raw = value
    if own != "BF16":
        return value
    return dtype, shape, packed(struct.unpack(f"<{len(raw) // 2}f", b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))), dtype)


def config_of(model, **quantisation):
    config = json.loads((HF / model / "config.json").read_text())
    return dict(config, quantization_config=quantisation) if quantisation else config


def fp8_folder(folder):
    """DeepSeek-V3 in FP8, and the same tensors dequantised as values."""
    held, values, state = {}, {}, 1
    for key, (dtype, shape, raw) in tensors(HF / "deepseek_v3_mtp_bf16").items():
        held[key] = dtype, shape, raw
        if not key.endswith("_proj.weight") and not key.endswith("kv_a_proj_with_mqa.weight") or "eh_proj" in key:
            continue
        rows, columns = shape
        down, across = -(-rows // BLOCK), -(-columns // BLOCK)
        codes = bytearray()
        for _ in range(rows * columns):
            state = (state * 1103515245 + 12345) % 2**31
            code = state >> 16 & 255
            codes.append(code if 8 <= (code & 127) < 120 else code & 128 | 0x38)
        scales = [math.ldexp(1 + i % 3, -6 - i % 2) for i in range(down * across)]
        held[key] = "F8_E4M3", shape, bytes(codes)
        held[key + "_scale_inv"] = "F32", [down, across], packed(scales, "F32")
        values[key] = [e4m3(codes[r * columns + c]) * scales[r // BLOCK * across + c // BLOCK] for r in range(rows) for c in range(columns)]
    config = config_of("deepseek_v3_mtp_bf16", quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK])
    return write(folder, held, config), values


def mxfp4_folder(folder):
    """GPT-OSS in MXFP4; its toy's expert sizes are no multiples of 32, so it gets wider ones."""
    held, values, state = {}, {}, 7
    config = config_of("gpt_oss_bf16", quant_method="mxfp4", modules_to_not_convert=["model.embed_tokens"])
    ffn, hidden, experts = 64, config["hidden_size"], config["num_local_experts"]
    config["intermediate_size"] = ffn
    for key, (dtype, shape, raw) in tensors(HF / "gpt_oss_bf16").items():
        if key.endswith("gate_up_proj_bias"):
            held[key] = dtype, [experts, 2 * ffn], b"\x80\x3f" * (experts * 2 * ffn)
        if not key.endswith("experts.gate_up_proj") and not key.endswith("experts.down_proj"):
            held.setdefault(key, (dtype, shape, raw))
            continue
        rows, columns = (2 * ffn, hidden) if key.endswith("gate_up_proj") else (hidden, ffn)
        groups = columns // 32
        blocks, scales = bytearray(), bytearray()
        for _ in range(experts * rows * groups):
            for _ in range(16):
                state = (state * 1103515245 + 12345) % 2**31
                blocks.append(state >> 16 & 255)
            scales.append(120 + state % 9)
        nibbles = [n for byte in blocks for n in (byte & 15, byte >> 4)]
        flat = [FP4[n] * math.ldexp(1, scales[i // 32] - 127) for i, n in enumerate(nibbles)]
        held[key + "_blocks"] = "U8", [experts, rows, groups, 16], bytes(blocks)
        held[key + "_scales"] = "U8", [experts, rows, groups], bytes(scales)
        values[key] = [experts, columns, rows], [flat[(e * rows + r) * columns + c] for e in range(experts) for c in range(columns) for r in range(rows)]
    return write(folder, held, config), values


class Quantised(Case):
    def setUp(self):
        super().setUp()
        self.fp8, fp8 = fp8_folder(self.tmp / "fp8")
        self.mxfp4, mxfp4 = mxfp4_folder(self.tmp / "mxfp4")
        shapes = {key: value[1] for key, value in tensors(self.fp8).items()}
        self.cases = [(self.fp8, {key: (shapes[key], value) for key, value in fp8.items()}, ["--tp", 2, "--pp", 2]), (self.mxfp4, mxfp4, ["--tp", 2, "--ep", 2])]

    def expected(self, source, values, dtype):
        gone = ("_scale_inv", "_blocks", "_scales")
        out = {key: widened(value, dtype) for key, value in tensors(source).items() if not key.endswith(gone) and key not in values}
        for key, (shape, numbers) in values.items():
            out[key] = dtype, shape, packed(numbers, dtype)
        for key, (own, shape, raw) in out.items():
            if key.endswith("e_score_correction_bias"):
                out[key] = widened((own, shape, raw), "F32")
        return out

    def test_dequantised_to_megatron_and_back(self):
        for source, values, grid in self.cases:
            with self.subTest(source.name):
                first, second, back = (self.tmp / f"{source.name}.{x}" for x in "abc")
                self.ok("convert", source, first, "--to", "torch_dist", "--dtype", "bf16", *grid, "-q")
                self.ok("convert", source, second, "--to", "mp_rank", "--dtype", "bf16", "-q")
                self.ok("convert", first, back, "--to", "hf", "-q")
                wanted = self.expected(source, values, "BF16")
                got = tensors(back)
                self.assertEqual(sorted(got), sorted(wanted))
                for key in wanted:
                    self.assertEqual(got[key], wanted[key], key)
                config = json.loads((back / "config.json").read_text())
                self.assertNotIn("quantization_config", config)
                self.assertEqual(config["dtype"], "bfloat16")
                self.assertEqual({digest(x) for x in (first, second)}, {digest(back)})
                self.ok("verify", first, "-q")

    def test_dequantised_to_keys_of_its_own(self):
        for source, values, _ in self.cases:
            for dtype, name in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
                with self.subTest(source.name, dtype=dtype):
                    out, dcp = self.tmp / f"{source.name}.{dtype}", self.tmp / f"{source.name}.{dtype}.dcp"
                    self.ok("convert", source, out, "--to", "hf", "--dtype", dtype.lower(), "--max-shard-size", "100KB", "-q")
                    self.ok("convert", source, dcp, "--to", "dcp", "--dtype", dtype.lower(), "-q")
                    wanted, got = self.expected(source, values, dtype), tensors(out)
                    self.assertEqual(sorted(got), sorted(wanted))
                    for key in wanted:
                        if dtype != "F16" or key in values:
                            self.assertEqual(got[key], wanted[key], key)
                    config = json.loads((out / "config.json").read_text())
                    self.assertNotIn("quantization_config", config)
                    self.assertEqual(config["dtype"], name)
                    self.assertEqual(digest(out), digest(dcp))

    def test_kept_as_stored(self):
        for source, _, _ in self.cases:
            with self.subTest(source.name):
                out, dcp, back = (self.tmp / f"{source.name}.{x}" for x in ("hf", "dcp", "back"))
                self.ok("convert", source, out, "--to", "hf", "-q")
                self.assertEqual(plain(out), plain(source))
                self.assertEqual((out / "config.json").read_bytes(), (source / "config.json").read_bytes())
                self.ok("convert", source, dcp, "--to", "dcp", "-q")
                self.ok("convert", dcp, back, "--to", "hf", "-q")
                self.assertEqual(plain(back), plain(source))
                self.assertEqual({digest(out), digest(dcp)}, {digest(source)})
                self.ok("verify", source, "-q")
                self.ok("inspect", source)
                for grid in (["--to", "torch_dist"], ["--to", "mp_rank", "--tp", 2]):
                    self.assertIn("--dtype", self.refused(4, "convert", source, self.tmp / "no", *grid))
                self.refused(4, "convert", source, self.tmp / "no", "--to", "hf", "--dtype", "f8_e5m2")

    def test_a_weight_and_its_scale_never_part(self):
        fp8 = "model.layers.0.mlp.down_proj.weight"
        mxfp4 = "model.layers.1.mlp.experts.down_proj"
        for source, gone in ((self.fp8, fp8), (self.fp8, fp8 + "_scale_inv"), (self.mxfp4, mxfp4 + "_blocks"), (self.mxfp4, mxfp4 + "_scales")):
            with self.subTest(gone):
                held = tensors(source)
                del held[gone]
                short = write(self.tmp / gone, held, json.loads((source / "config.json").read_text()))
                self.finding("missing", short)
                for more in ([], ["--dtype", "bf16"]):
                    self.refused(6, "convert", short, self.tmp / "no", "--to", "hf", *more)

    def test_scales_that_give_no_number(self):
        fp8, mxfp4 = "model.layers.0.mlp.down_proj.weight_scale_inv", "model.layers.1.mlp.experts.down_proj_scales"
        cases = [(self.fp8, fp8, struct.pack("<f", value)) for value in (0.0, -1.0, math.inf, math.nan, 3e38)] + [(self.mxfp4, mxfp4, bytes([value])) for value in (253, 255)]
        for source, key, raw in cases:
            with self.subTest(raw):
                held = tensors(source)
                dtype, shape, whole = held[key]
                held[key] = dtype, shape, raw + whole[len(raw) :]
                self.finding("nonfinite", write(self.tmp / "changed", held, json.loads((source / "config.json").read_text())))
                shutil.rmtree(self.tmp / "changed")
        for source in (self.fp8, self.mxfp4):
            self.ok("verify", source, "-q")

    def test_scales_of_another_shape(self):
        for source, key, shape in ((self.fp8, "model.layers.0.mlp.down_proj.weight_scale_inv", [4, 2]), (self.mxfp4, "model.layers.1.mlp.experts.down_proj_scales", [4, 32, 4])):
            held = tensors(source)
            self.assertNotEqual(held[key][1], shape)
            held[key] = held[key][0], shape, held[key][2]
            wrong = write(self.tmp / key, held, json.loads((source / "config.json").read_text()))
            self.finding("shape", wrong)
            self.refused(6, "convert", wrong, self.tmp / "no", "--to", "hf", "--dtype", "bf16")
        config = json.loads((self.fp8 / "config.json").read_text())
        for bad in ([0, 128], [128], "128", [-1, 2], [2**40, 1]):
            config["quantization_config"]["weight_block_size"] = bad
            (self.fp8 / "config.json").write_text(json.dumps(config))
            self.refused(4, "convert", self.fp8, self.tmp / "no", "--to", "hf", "--dtype", "bf16")

    def test_validate_reads_them(self):
        for source, _, _ in self.cases:
            out = self.tmp / f"{source.name}.plain"
            self.ok("convert", source, out, "--to", "hf", "--dtype", "bf16", "-q")
            losses = {json.loads(self.ok("validate", x, "--json"))["loss"] for x in (source, out)}
            self.assertEqual(len(losses), 1)


if __name__ == "__main__":
    unittest.main()
