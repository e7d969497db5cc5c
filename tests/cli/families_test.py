"""Hugging Face folders and Megatron checkpoints: to every layout and back, byte for byte; genuine pairs; families as files."""
import json
import pathlib
import shutil
import struct
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, digest, run_json  # noqa: E402
from torch_edit import Archive, edit_archive  # noqa: E402

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


def write(folder, held):
    """The weights of a folder anew, in one file."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    header, data = {}, b""
    for key, (dtype, shape, raw) in held.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


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
        for arg, value, word in (("rotary_interleaved", True, "rotation"), ("position_embedding_type", "none", "rope"),
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

    def edited(self, **settings):
        """A Megatron llama with other args."""
        copy = self.tmp / "edited"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(DATA / "mcore/llama_untied_bf16/tp2pp2vpp2_mcore016", copy)
        edit_archive(next(copy.rglob("common.pt")), lambda root: vars(root["args"]).update(settings))
        return copy

    def test_settings_of_which_config_json_does_not_speak(self):
        """Weights that compute something else by what is written beside them are not written."""
        for settings in ({"apply_layernorm_1p": True}, {"layernorm_zero_centered_gamma": True}, {"rotary_interleaved": True}, {"position_embedding_type": "none"},
                         {"position_embedding_type": "mrope"}, {"softmax_type": "off-by-one"}, {"no_rope_freq": 2}, {"apply_residual_connection_post_layernorm": True},
                         {"activation_func_clamp_value": 0.5}, {"glu_linear_offset": 1.0}, {"softmax_scale": 0.1}, {"qk_l2_norm": True}, {"attention_output_gate": True}, {"is_hybrid_model": True},
                         {"hybrid_override_pattern": "M*M*"}, {"heterogeneous_layers_config_path": "x"}, {"window_size": (7, 0), "window_attn_skip_freq": 2}):
            with self.subTest(settings):
                self.assertIn("has no place for", self.refused(6, "convert", self.edited(**settings), self.tmp / "x", "--to", "hf"))

    def test_settings_that_another_family_has(self):
        """transformers' Llama knows no window and turns whole heads."""
        for settings, family in (({"window_size": (7, 0)}, "mistral"), ({"rotary_percent": 0.5}, "phi3"), ({"rotary_percent": 0.5, "window_size": (7, 0)}, "phi3"), ({"window_size": (-1, 0)}, "llama")):
            with self.subTest(settings):
                source, out = self.edited(**settings), self.tmp / "out"
                self.ok("convert", source, out, "--to", "hf", "-q", "--force")
                config = json.loads((out / "config.json").read_text())
                self.assertEqual((config["model_type"], config.get("sliding_window")), (family, 8 if settings.get("window_size") == (7, 0) else None))
                self.assertEqual(digest(out), digest(source))
                self.ok("validate", out, "--against", source)
        for settings in ({"window_size": (7, 0)}, {"rotary_percent": 0.5}):
            self.assertIn("has no place for", self.refused(6, "convert", self.edited(**settings), self.tmp / "x", "--to", "hf", "--family", "llama"))

    def test_epsilon_by_its_newer_name(self):
        for settings in ({"norm_epsilon": 0.1, "layernorm_epsilon": 0.01}, {"norm_epsilon": 0.01, "layernorm_epsilon": None}):
            source, out = self.edited(**settings), self.tmp / "out"
            self.ok("convert", source, out, "--to", "hf", "-q", "--force")
            self.assertEqual(json.loads((out / "config.json").read_text())["rms_norm_eps"], 0.01)
            self.ok("validate", out, "--against", source)

    def set_config(self, folder, **values):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def test_a_model_that_lacks_what_its_family_always_has(self):
        """GPT-2 has biases everywhere; a Megatron model with those of qkv alone would be read with others at random."""
        source = self.copy("legacy/gpt_tied_bf16_te_names/tp1pp1")

        def without_biases(root):
            root["args"].add_bias_linear = False
            for key in [key for key in root["model"] if key.endswith(".bias") and ("linear_proj" in key or "linear_fc" in key)]:
                del root["model"][key]
        edit_archive(source / "iter_0000010/mp_rank_00/model_optim_rng.pt", without_biases)
        self.ok("verify", source, "-q")
        self.assertIn("layers.0.attention.", self.refused(6, "convert", source, self.tmp / "out", "--to", "hf"))
        self.assertFalse((self.tmp / "out").exists())

    def test_experts_as_grouped_mlp_kept_them(self):
        """mlp.experts.weight1 and weight2: a rank's experts in one tensor each, matrix behind matrix, transposed."""
        source = self.copy("legacy/moe_bf16/tp1pp2ep2")
        for file in source.rglob("model_optim_rng.pt"):
            archive = Archive(file)
            model = archive.root["model"]
            for layer in range(2):
                for matrix in (1, 2):
                    keys = [f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.linear_fc{matrix}." for e in range(2)]
                    parts = [model.pop(key + "weight") for key in keys]
                    rows, columns = parts[0].args[2]
                    data = b""
                    for part in parts:
                        raw = archive.bytes_of(part)
                        data += b"".join(bytes(raw[2 * (r * columns + c) :][:2]) for c in range(columns) for r in range(rows))
                    archive.bytes_of(parts[0])[:] = data
                    parts[0].args[0].pid = (*parts[0].args[0].pid[:4], len(data) // 2)
                    shape = (columns, 2 * rows) if matrix == 1 else (2 * columns, rows)
                    parts[0].args = (parts[0].args[0], 0, shape, (shape[1], 1), *parts[0].args[4:])
                    model[f"decoder.layers.{layer}.mlp.experts.weight{matrix}"] = parts[0]
                    for key in keys:
                        del model[key + "_extra_state"]
            archive.save()
        self.ok("verify", source, "-q")
        self.assertEqual(digest(source), digest(DATA / "legacy/moe_bf16/tp1pp2ep2"))
        for target, options in (("hf", ()), ("torch_dist", ("--tp", 2)), ("mp_rank", ("--tp", 2, "--ep", 1))):
            out = self.tmp / target
            self.ok("convert", source, out, "--to", target, *options, "-q")
            self.ok("verify", out, "-q")
            self.assertEqual(digest(out), digest(source))

    def test_a_tied_pair_stored_as_its_head(self):
        """safetensors.torch.save_model keeps whichever of two names of one tensor comes first."""
        source = self.copy("hf/gpt2_tied_f32")
        write(source, {"lm_head.weight" if key == "transformer.wte.weight" else key: held for key, held in tensors(source).items()})
        self.ok("verify", source, "-q")
        self.assertEqual(digest(source), digest(HF / "gpt2_tied_f32"))
        for target in ("hf", "torch_dist", "mp_rank", "dcp", "hdf5"):
            with self.subTest(target):
                out = self.tmp / target
                self.ok("convert", source, out, "--to", target, "-q")
                self.ok("verify", out, "-q")
                self.assertEqual(digest(out), digest(source))
        self.assertIn("transformer.wte.weight", tensors(self.tmp / "hf"))
        self.ok("diff", source, HF / "gpt2_tied_f32", "-q")

    def test_a_tied_pair_stored_twice(self):
        source = self.tmp / "both"
        self.ok("convert", DATA / "mcore/llama_tied_bf16/tp1pp1", source, "--to", "hf", "-q")
        held = tensors(source)
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
        write(source, held)
        for target in ("hf", "torch_dist", "dcp", "hdf5"):
            with self.subTest(target):
                self.ok("convert", source, self.tmp / target, "--to", target, "-q")
                self.ok("verify", self.tmp / target, "-q")
                self.assertEqual(digest(self.tmp / target), digest(source))

    def test_architectures_without_a_causal_head_keep_their_keys(self):
        source = self.copy("hf/llama_untied_bf16")
        self.set_config(source, architectures=["LlamaModel"])
        write(source, {key.removeprefix("model."): held for key, held in tensors(source).items() if key != "lm_head.weight"})
        head = self.tmp / "score"
        shutil.copytree(HF / "llama_untied_bf16", head)
        self.set_config(head, architectures=["LlamaForSequenceClassification"])
        write(head, {key.replace("lm_head", "score"): held for key, held in tensors(head).items()})
        for folder, name in ((source, "LlamaModel"), (head, "LlamaForSequenceClassification")):
            status, out = run_json("verify", folder)
            self.assertEqual(status, 0, out)
            self.assertIn(name, " ".join(f["message"] for f in out["findings"]))
            for target in ("hf", "dcp", "hdf5"):
                with self.subTest(name, target=target):
                    out = self.tmp / f"{name}.{target}"
                    self.ok("convert", folder, out, "--to", target, "-q")
                    self.ok("verify", out, "--against", folder, "-q")
                    self.assertTrue((out / "config.json").is_file())
            for target in ("torch_dist", "mp_rank"):
                self.assertIn(name, self.refused(6, "convert", folder, self.tmp / "x", "--to", target))

    def test_list(self):
        names = {f["family"] for f in json.loads(self.ok("families", "--json"))["families"]}
        self.assertTrue({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "nemotron", "mixtral", "qwen2_moe",
                         "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"} <= names)


if __name__ == "__main__":
    unittest.main()
