"""MuP's multipliers of embeddings, scores and logits, against the real megatron-core's GPTModel. Its releases up to 0.16.1 know no
use_mup: there a softmax scale, and hooks that multiply what the embedding and the head give, stand for it, with figures worked out here."""
import argparse
import contextlib
import unittest

from peers_python import need

need("torch and megatron-core")

from support import Case, run, run_json  # noqa: E402
import megatron_cpu  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

# Dropout, which evaluation leaves out, would draw from a GPU's generator.
type(megatron_cpu.tensor_parallel.get_cuda_rng_tracker()).fork = lambda self, *ignored: contextlib.nullcontext()
KNOWS_MUP = hasattr(megatron_cpu.TransformerConfig, "use_mup")

# 4 heads of 8 lanes, hidden 32.
GPT = dict(num_layers=2, hidden_size=32, ffn_hidden_size=96, num_attention_heads=4, kv_channels=8, max_position_embeddings=24, padded_vocab_size=128,
           vocab_size=128, normalization="LayerNorm", layernorm_epsilon=1e-5, add_bias_linear=True, position_embedding_type="learned_absolute",
           params_dtype="float32", tensor_model_parallel_size=1, pipeline_model_parallel_size=1, bias_gelu_fusion=False)
LLAMA = dict(GPT, normalization="RMSNorm", add_bias_linear=False, swiglu=True, position_embedding_type="rope", group_query_attention=True,
             num_query_groups=2, untie_embeddings_and_output_weights=True)

# MuP's arguments; what they make of embeddings, scores (√8 = 2.8284271) and logits.
MUP = {
    "output given": (dict(mup_base_hidden_size=16, mup_output_mult=0.3), (1, 1 / 8, 0.3)),
    "output by width": (dict(mup_base_hidden_size=8), (1, 1 / 8, 1 / 4)),
    "width as an argument counts for nothing": (dict(mup_base_hidden_size=8, mup_width_mult=2.0), (1, 1 / 8, 1 / 4)),
    "base head": (dict(mup_base_hidden_size=16, mup_base_head_dim=4.0), (1, 2 / 8, 1 / 2)),
    "power": (dict(mup_base_hidden_size=16, mup_base_head_dim=4.0, mup_attn_scale_power=0.5), (1, 2 / 2.8284271, 1 / 2)),
    "embedding": (dict(mup_embedding_mult=3.0), (3, 1 / 8, 1)),
    "softmax scale given": (dict(mup_base_hidden_size=16, softmax_scale=0.7, mup_embedding_mult=0.5), (0.5, 0.7, 1 / 2)),
}


def model_of(here, given, factors):
    """The model with its multipliers: by use_mup where this megatron-core knows it, otherwise by what they are."""
    embedding, scores, logits = factors
    plain = megatron_cpu.config_of
    megatron_cpu.config_of = lambda args: with_mup(plain(args), given, scores)
    try:
        model = here.model(None).eval()
    finally:
        megatron_cpu.config_of = plain
    if not KNOWS_MUP:
        model.embedding.register_forward_hook(lambda module, inputs, out: out * embedding)
        model.output_layer.register_forward_hook(lambda module, inputs, out: (out[0] * logits, out[1]))
    return model


def with_mup(config, given, scores):
    more = dict(use_mup=True, **given) if KNOWS_MUP else dict(softmax_scale=scores)
    for name, value in more.items():
        setattr(config, name, value)
    config.init_method = config.output_layer_init_method = None
    config.__post_init__()
    return config


def reference(args, given, factors, folder, path):
    """An mp_rank checkpoint of a random model, and what Megatron computes of it."""
    with megatron_cpu.Rank(args, 1, 0) as here:
        model = model_of(here, given, factors)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.normal_(1 if "norm" in name and name.endswith("weight") else 0, 0.2)
        ids = torch.randint(0, args["vocab_size"], (2, 17))
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        positions = torch.arange(16).expand(2, 16).contiguous()
        mask = torch.triu(torch.ones(16, 16), diagonal=1).bool()[None, None]
        with torch.no_grad():
            logits = model(inputs, positions, mask)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)
            assert (model(inputs, positions, mask, labels=labels) - loss).abs().max() < 1e-5
        weights = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    (folder / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save({"args": argparse.Namespace(**dict(args, use_mup=True, transformer_impl="local", **given)), "model": weights, "iteration": 1, "checkpoint_version": 3.0},
               folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    save_file(dict(input_ids=inputs, labels=labels, logits=logits, loss=loss), path)


class Mup(Case):
    def test_multipliers(self):
        for kind, model in (("gpt", GPT), ("llama", LLAMA)):
            for what, (given, factors) in MUP.items():
                folder, path = self.tmp / kind / what, self.tmp / f"{kind} {what}.safetensors"
                reference(model, given, factors, folder, path)
                for more in ((), ("--tp", 2, "--pp", 2)):
                    with self.subTest(f"{kind}, {what} {more}"):
                        _, out = run_json("validate", folder, "--reference", path, *more)
                        self.assertLess(out["reference"]["max_abs_logits"], 2e-4)
                        self.assertLess(out["reference"]["max_abs_loss"], 1e-4)

    def test_no_family_without_a_place_for_them_takes_them(self):
        for what, arg in (("embedding", "mup_embedding_mult"), ("output by width", "mup_output_mult"), ("power", "mup_output_mult")):
            with self.subTest(what):
                given, factors = MUP[what]
                folder = self.tmp / what
                reference(LLAMA, given, factors, folder, self.tmp / "unused.safetensors")
                status, _, error = run("convert", folder, self.tmp / f"{what} hf", "--to", "hf", "--family", "llama")
                self.assertNotEqual(status, 0)
                self.assertIn(arg, error)
                self.assertFalse((self.tmp / f"{what} hf").exists())

    def test_factors_of_one_are_no_hindrance(self):
        folder = self.tmp / "neutral"
        reference(LLAMA, dict(softmax_scale=8 ** -0.5), (1, 8 ** -0.5, 1), folder, self.tmp / "neutral.safetensors")
        self.ok("convert", folder, self.tmp / "hf", "--to", "hf", "--family", "llama")
        _, out = run_json("validate", self.tmp / "hf", "--reference", self.tmp / "neutral.safetensors")
        self.assertLess(out["reference"]["max_abs_logits"], 2e-4)


if __name__ == "__main__":
    print("megatron-core", megatron_cpu.megatron.core.__version__, "with its own use_mup" if KNOWS_MUP else "without use_mup: hooks stand for it")
    unittest.main()
