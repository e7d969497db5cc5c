"""Models that transformers makes, of every family: to Megatron in two layouts and back, the same tensors, bytes and dtypes,
the same config in meaning, and the same logits when transformers loads the result."""
import pathlib
import unittest

from peers_python import need

need("torch, safetensors and transformers")

from support import Case, digest, run_json  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

transformers.logging.set_verbosity_error()

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=101, max_position_embeddings=64)
MLA = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, vocab_size=101, n_routed_experts=4,
           num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1)
MODELS = {
    "llama": ("Llama", SMALL),
    "llama_biases": ("Llama", dict(SMALL, attention_bias=True, mlp_bias=True)),
    "llama_attention_bias": ("Llama", dict(SMALL, attention_bias=True)),
    "llama_linear_rope": ("Llama", dict(SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})),
    "mistral": ("Mistral", dict(SMALL, sliding_window=8)),
    "qwen2_window": ("Qwen2", dict(SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3_tied": ("Qwen3", dict(SMALL, tie_word_embeddings=True)),
    "gemma": ("Gemma", SMALL),
    "gemma2": ("Gemma2", dict(SMALL, sliding_window=8, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3", dict(SMALL, sliding_window=8, query_pre_attn_scalar=8)),
    "phi3": ("Phi3", dict({k: v for k, v in SMALL.items() if k != "head_dim"}, pad_token_id=0, sliding_window=8)),
    "phi3_partial": ("Phi3", dict({k: v for k, v in SMALL.items() if k != "head_dim"}, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})),
    "nemotron": ("Nemotron", SMALL),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=101)),
    "gpt2_untied": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=101, n_inner=40, tie_word_embeddings=False)),
    "gpt_neox": ("GPTNeoX", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=101, use_parallel_residual=False)),
    "gpt_neox_unbiased": ("GPTNeoX", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=101, attention_bias=False)),
    "mixtral": ("Mixtral", dict(SMALL, num_local_experts=4)),
    "qwen2_moe": ("Qwen2Moe", dict({k: v for k, v in SMALL.items() if k != "head_dim"}, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4, num_experts_per_tok=2)),
    "qwen3_moe_mixed": ("Qwen3Moe", dict(SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1])),
    "gpt_oss": ("GptOss", dict(SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "deepseek_v2": ("DeepseekV2", dict(MLA, q_lora_rank=24)),
    "deepseek_v2_lite": ("DeepseekV2", dict(MLA, q_lora_rank=None)),
    "deepseek_v3": ("DeepseekV3", dict(MLA, q_lora_rank=24)),
}


def make(name, folder, dtype=torch.bfloat16):
    kind, settings = MODELS[name]
    config_class = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    config = config_class(**settings)
    torch.manual_seed(len(name))
    model_class = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, kind + "ForCausalLM"))
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return model


def tensors(folder):
    out = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        out.update(load_file(file))
    return out


class Models(Case):
    def same_logits(self, kind, a, b):
        ids = torch.arange(24).reshape(2, 12) % 101
        logits = []
        for folder in (a, b):
            model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            self.assertFalse(report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"], report)
            with torch.no_grad():
                logits.append(model.eval()(ids).logits)
        self.assertTrue(torch.equal(*logits), f"logits differ by {(logits[0] - logits[1]).abs().max()}")


class RoundTrips(Models):
    def same(self, a, b):
        self.assertEqual(sorted(a), sorted(b))
        for key in a:
            if key.endswith("e_score_correction_bias"):  # F32 by rule
                self.assertTrue(torch.equal(a[key].float(), b[key].float()), key)
                continue
            self.assertEqual((a[key].dtype, a[key].shape), (b[key].dtype, b[key].shape), key)
            self.assertTrue(torch.equal(a[key].flatten().view(torch.uint8), b[key].flatten().view(torch.uint8)), key)


def add_case(name):
    def test(self):
        source, dist, ranks, back = (self.tmp / x for x in ("hf", "dist", "ranks", "back"))
        model = make(name, source)
        tp, pp = 2, 1 if model.config.num_hidden_layers % 2 else 2
        self.ok("convert", source, dist, "--to", "torch_dist", "--tp", tp, "-q")
        self.ok("verify", dist, "-q")
        self.ok("convert", dist, ranks, "--to", "mp_rank", "--tp", 1, "--pp", pp, "-q")
        self.ok("convert", ranks, back, "--to", "hf", "-q")
        self.same(tensors(source), tensors(back))
        self.assertEqual((source / "config.json").read_bytes(), (back / "config.json").read_bytes())
        if "attention_bias" not in name and "unbiased" not in name:  # Megatron's zero biases count
            self.assertEqual(digest(source), digest(dist))
            self.assertEqual(digest(source), digest(ranks))
        self.same_logits(type(model), source, back)

    setattr(RoundTrips, f"test_{name}", test)


for each in MODELS:
    add_case(each)


class Heads(Case):
    """The rules of transformers for a tied head."""

    def test_stored_equal_head_is_tied_and_a_different_one_wins(self):
        source = self.tmp / "hf"
        make("qwen3_tied", source)
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        self.assertTrue(run_json("inspect", source)[1]["tied"])
        tied = digest(source)
        weights["lm_head.weight"][3, 3] += 1
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        self.assertFalse(run_json("inspect", source)[1]["tied"])
        self.assertNotEqual(tied, digest(source))

    def test_missing_head_is_refused(self):
        source = self.tmp / "hf"
        make("llama", source)
        weights = load_file(source / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        self.refused(6, "convert", source, self.tmp / "out", "--to", "mp_rank", "-q")

    def test_older_gpt2_without_prefix(self):
        source = self.tmp / "hf"
        make("gpt2", source)
        before = digest(source)
        weights = {key.removeprefix("transformer."): value for key, value in load_file(source / "model.safetensors").items()}
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        self.assertEqual(before, digest(source))


class WithoutConfig(Models):
    """Megatron checkpoints that bring no config.json get one from their args, which transformers reads the same way."""

    def check(self, name):
        source, dist, back = (self.tmp / x for x in ("hf", "dist", "back"))
        make(name, source)
        self.ok("convert", source, dist, "--to", "torch_dist", "-q")
        for file in (dist / "hf").iterdir():
            file.unlink()
        (dist / "hf").rmdir()
        self.ok("convert", dist, back, "--to", "hf", "-q")
        self.same_logits(transformers.AutoModelForCausalLM, source, back)  # of another class, where two compute the same

    def test_families(self):
        for name in ("llama", "mistral", "phi3_partial", "qwen2_window", "qwen3_tied", "mixtral", "qwen2_moe", "qwen3_moe_mixed", "gpt2", "nemotron", "gpt_oss", "deepseek_v2", "deepseek_v3"):
            with self.subTest(name):
                self.setUp()
                self.check(name)


if __name__ == "__main__":
    unittest.main()
