"""Hugging Face folders and Megatron checkpoints: to every layout and back, byte for byte; genuine pairs; families as files."""
import json
import pathlib
import shutil
import struct
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, digest, run_json  # noqa: E402
from torch_edit import edit_archive  # noqa: E402

HF, PAIRS = DATA / "hf", DATA / "pairs"
GRIDS = (["--tp", 4, "--pp", 2], ["--tp", 2, "--pp", 2, "--vpp", 2], ["--tp", 1, "--pp", 4])
EXPERT_GRIDS = (["--tp", 2, "--ep", 2], ["--tp", 2, "--pp", 2, "--ep", 4, "--etp", 1])
F32_BY_RULE = "e_score_correction_bias"


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


def widened(value):
    dtype, shape, raw = value
    if dtype != "BF16":
        return value
    return "F32", shape, b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))


class Families(Case):
    def same(self, a, b):
        a, b = tensors(a), tensors(b)
        self.assertEqual(sorted(a), sorted(b))
        for key in a:
            if key.endswith(F32_BY_RULE):
                self.assertEqual(widened(a[key]), widened(b[key]), key)
            else:
                self.assertEqual(a[key], b[key], key)

    def test_to_every_layout_and_back(self):
        for model in sorted(HF.iterdir()):
            config = json.loads((model / "config.json").read_text())
            grids = [*GRIDS, *(EXPERT_GRIDS if "num_experts_per_tok" in config else ())]
            for number, grid in enumerate(grids):
                with self.subTest(model.name, grid=grid):
                    first, second, back = (self.tmp / f"{model.name}.{number}.{x}" for x in "abc")
                    formats = ("torch_dist", "mp_rank") if number % 2 else ("mp_rank", "torch_dist")
                    self.ok("convert", model, first, "--to", formats[0], *grid, "-q")
                    self.ok("convert", first, second, "--to", formats[1], "--tp", 1, "--pp", 1, "-q")
                    self.ok("convert", second, back, "--to", "hf", "-q")
                    self.same(model, back)
                    self.assertEqual((model / "config.json").read_bytes(), (back / "config.json").read_bytes())
                    self.assertEqual({digest(x) for x in (model, first, second, back)}, {digest(model)})
                    self.ok("verify", first, "-q")

    def test_genuine_pairs(self):
        for family in sorted(PAIRS.iterdir()):
            for layout in family.iterdir():
                with self.subTest(family.name):
                    self.assertEqual(digest(layout), digest(HF / family.name))
                    out = self.tmp / family.name
                    self.ok("convert", layout, out, "--to", "hf", "-q")
                    self.same(HF / family.name, out)
                    self.ok("diff", layout, HF / family.name, "-q")

    def test_shards_of_a_size_and_an_index(self):
        out = self.tmp / "out"
        self.ok("convert", HF / "qwen3_moe_bf16", out, "--to", "hf", "--max-shard-size", "60KB", "-q")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        self.assertEqual(set(index["weight_map"]), set(tensors(out)))
        self.assertEqual(index["metadata"]["total_size"], sum(len(t[2]) for t in tensors(out).values()))
        self.assertEqual(digest(out), digest(HF / "qwen3_moe_bf16"))

    def test_plain_dcp_keeps_keys_and_digest(self):
        for name in ("gpt_oss_bf16", "deepseek_v3_mtp_bf16"):
            out = self.tmp / name
            self.ok("convert", HF / name, out, "--to", "dcp", "-q")
            self.assertEqual(digest(out), digest(HF / name))

    def test_impossible_layouts(self):
        self.refused(5, "convert", HF / "gpt2_tied_f32", self.tmp / "x", "--to", "mp_rank", "--tp", 3)
        self.refused(5, "convert", HF / "qwen3_moe_bf16", self.tmp / "x", "--to", "mp_rank", "--ep", 3)

    def test_every_missing_tensor_is_found(self):
        source = self.copy("hf/qwen3_moe_bf16")
        file = source / "model.safetensors"
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        for gone in ("model.layers.2.mlp.experts.3.up_proj.weight", "model.norm.weight", "model.layers.3.self_attn.k_norm.weight", "model.layers.1.mlp.gate.weight"):
            with self.subTest(gone):
                renamed = {("extra" if key == gone else key): value for key, value in header.items()}
                text = json.dumps(renamed).encode()
                file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
                status, out = run_json("verify", source)
                self.assertEqual(status, 1)
                self.assertTrue({"missing", "unexpected"} <= {f["rule"] for f in out["findings"] if f["severity"] == "error"}, out)
                self.refused(6, "convert", source, self.tmp / "out", "--to", "torch_dist")

    def changed(self, name, change, folder="changed"):
        """A copy of a model whose config.json says something else."""
        out = self.tmp / folder
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(HF / name, out)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | change))
        return out

    def test_another_model_than_args_can_say(self):
        """What transformers would compute, and Megatron by these args would not."""
        cases = [("llama_untied_bf16", {"hidden_act": "gelu"}, 6, "activation is gelu"), ("llama_untied_bf16", {"hidden_act": "nonsense"}, 4, "nonsense"), ("llama_untied_bf16", {"is_causal": False}, 4, "is_causal"),
                 ("llama_untied_bf16", {"rms_norm_eps": "1e-5"}, 4, "rms_norm_eps"), ("llama_untied_bf16", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "attention_factor": 1.3}}, 6, "concentration"),
                 ("gpt2_tied_f32", {"scale_attn_weights": False}, 6, "softmax scale"), ("gpt2_tied_f32", {"scale_attn_by_inverse_layer_idx": True}, 6, "layer 1's softmax scale"),
                 ("gpt2_tied_f32", {"activation_function": "relu"}, 6, "activation is relu"), ("gpt_oss_bf16", {"swiglu_alpha": 1.0}, 6, "factor is 1"),
                 ("deepseek_v3_mtp_bf16", {"norm_topk_prob": False}, 6, "renormalised"), ("deepseek_v3_mtp_bf16", {"num_experts_per_tok": 1}, 4, "num_experts_per_tok"),
                 ("deepseek_v3_mtp_bf16", {"routed_scaling_factor": "x"}, 4, "routed_scaling_factor")]
        for name, change, status, word in cases:
            with self.subTest(f"{name} {change}"):
                self.assertIn(word, self.refused(status, "convert", self.changed(name, change), self.tmp / "no", "--to", "torch_dist"))

    def test_args_say_what_config_says(self):
        """The converted model without the carried config.json computes the same; the fields that change nothing are those that transformers leaves out."""
        cases = [("gpt2_tied_f32", {"activation_function": "gelu"}), ("llama_untied_bf16", {"rms_norm_eps": None}), ("llama_untied_bf16", {"partial_rotary_factor": 0.5}),
                 ("llama_untied_bf16", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 4}), ("llama_untied_bf16", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
                 ("deepseek_v3_mtp_bf16", {"topk_method": "greedy"}), ("deepseek_v3_mtp_bf16", {"moe_layer_freq": 2})]
        for name, change in cases:
            with self.subTest(f"{name} {change}"):
                source, out = self.changed(name, change), self.tmp / "out"
                shutil.rmtree(out, ignore_errors=True)
                self.ok("convert", source, out, "--to", "torch_dist", "-q")
                shutil.rmtree(out / "hf")
                self.ok("validate", out, "--against", source)

    def test_biases_that_config_does_not_switch_on(self):
        self.finding("unexpected", self.changed("gpt_oss_bf16", {"attention_bias": False}))
        self.finding("missing", self.changed("deepseek_v3_mtp_bf16", {"attention_bias": True}))
        self.refused(6, "validate", self.changed("deepseek_v3_mtp_bf16", {"attention_bias": True}))

    def test_weights_that_are_integers(self):
        source = self.changed("gpt2_tied_f32", {})
        file = source / "model.safetensors"
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        next(value for key, value in header.items() if key.endswith("mlp.c_fc.weight"))["dtype"] = "I32"
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
        self.finding("dtype", source)

    def test_another_model_than_config_can_say(self):
        """Megatron's args, of which Llama's config.json has no place."""
        for arg, value, word in (("rotary_percent", 0.5, "lanes that turn"), ("rotary_interleaved", True, "rotation"), ("position_embedding_type", "none", "rope"), ("window_size", (7, 0), "window"),
                                 ("softmax_type", "off-by-one", "softmax"), ("no_rope_freq", 2, "rope"), ("apply_residual_connection_post_layernorm", True, "residual"),
                                 ("activation_func_clamp_value", 0.5, "clamp"), ("glu_linear_offset", 1.0, "offset"), ("layernorm_zero_centered_gamma", True, "norms")):
            with self.subTest(arg):
                copy = self.tmp / arg
                shutil.copytree(next((DATA / "legacy/llama_untied_bf16").iterdir()), copy)
                for file in copy.rglob("model_optim_rng.pt"):
                    edit_archive(file, lambda root: setattr(root["args"], arg, value))
                self.assertIn(word, self.refused(6, "convert", copy, self.tmp / "no", "--to", "hf"))

    def test_a_family_of_ones_own(self):
        source = self.copy("hf/llama_untied_bf16")
        config = json.loads((source / "config.json").read_text())
        config["model_type"] = "house_llama"
        (source / "config.json").write_text(json.dumps(config))
        self.assertIsNone(run_json("inspect", source)[1]["family"])
        mine = self.tmp / "mine.json"
        mine.write_text(self.ok("families", "llama", "--json"))
        self.ok("convert", source, self.tmp / "a", "--to", "torch_dist", "--tp", 2, "--family", mine, "-q")
        self.assertEqual(digest(self.tmp / "a"), digest(HF / "llama_untied_bf16"))
        short = self.tmp / "short.json"
        short.write_text('{"family": "house", "extends": "llama"}')
        self.ok("convert", source, self.tmp / "b", "--to", "mp_rank", "--pp", 2, "--family", short, "-q")
        for bad in ('{"family": "x"}', '{"family": "x", "extends": "none"}', "[]", '{"family": "x", "rows": [{"key": "a", "dims": "b", "factor": 3}]}', "{",
                    '{"family": "x", "extends": "llama", "params": 3}', '{"family": "x", "extends": "llama", "params": {"heads": [3]}}', '{"family": "x", "extends": "llama", "params": {"heads": []}}',
                    '{"family": "x", "extends": "llama", "window": "every"}', '{"family": "x", "extends": "llama", "rows": [{"key": "a.{l}", "dims": "hidden", "holds": "layers.{l}.a", "optoinal": true}]}'):
            short.write_text(bad)
            self.assertNotIn("exception", self.refused(4, "convert", source, self.tmp / "c", "--to", "mp_rank", "--family", short))
        self.refused(3, "families", "nobody")

    def test_list(self):
        names = {f["family"] for f in json.loads(self.ok("families", "--json"))["families"]}
        self.assertTrue({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "nemotron", "mixtral", "qwen2_moe",
                         "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"} <= names)


if __name__ == "__main__":
    unittest.main()
