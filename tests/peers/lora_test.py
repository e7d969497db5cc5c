"""Adapters that peft itself trains in and saves: our merge against peft's, and against the model with the adapter beside it."""
import unittest

from peers_python import need, skip

need("torch, transformers and peft")
try:
    import peft
except ImportError:
    skip("peft is not there")

from families_test import make, tensors  # noqa: E402
from support import Case, run_json  # noqa: E402

import torch  # noqa: E402

KINDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def ulps(a, b):
    """The largest distance in steps of the type; signs of magnitude become a line of integers."""
    a, b = (x.contiguous().view(KINDS[a.dtype]).long() for x in (a, b))
    lowest = -(2 ** (15 if a.dtype == torch.int16 or a.abs().max() < 2**15 else 31))
    a, b = (torch.where(x < 0, lowest - x, x) for x in (a, b))
    return int((a - b).abs().max())


class Merges(Case):
    def check(self, name, dtype=torch.bfloat16, adapter_dtype=torch.float32, pickled=False, **settings):
        base, folder, out, theirs = (self.tmp / x for x in ("base", "adapter", "out", "theirs"))
        model = make(name, base, dtype)
        kind = type(model)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(5)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.data = (torch.randn(parameter.shape) * 0.2).to(adapter_dtype if "lora_" in key else dtype)
        wrapped.save_pretrained(folder, safe_serialization=not pickled)
        self.assertEqual((folder / "adapter_model.bin").exists(), pickled)
        self.ok("verify", folder, "-q")
        self.assertEqual(run_json("inspect", folder)[1]["adapter"]["r"], config.r)
        self.ok("convert", base, out, "--to", "hf", "--merge-lora", "--adapter", folder, "-q")
        wrapped.merge_and_unload().save_pretrained(theirs)
        ours, wanted, before = tensors(out), tensors(theirs), tensors(base)
        self.assertEqual(sorted(ours), sorted(wanted))
        changed = 0
        for key in wanted:
            self.assertEqual((ours[key].dtype, ours[key].shape), (wanted[key].dtype, wanted[key].shape), key)
            if torch.equal(wanted[key], before[key]):
                self.assertTrue(torch.equal(ours[key], before[key]), key)
                continue
            changed += 1
            if dtype == torch.float32:  # order of sums; cancelling terms make steps meaningless
                torch.testing.assert_close(ours[key], wanted[key], rtol=1e-6, atol=1e-6)
            elif adapter_dtype == torch.float32:
                self.assertLessEqual(ulps(ours[key], wanted[key]), 1, key)
            else:  # peft rounds the product to the adapter's type before it adds it; we do not
                delta, step = (wanted[key].float() - before[key].float()).abs(), torch.finfo(adapter_dtype).eps
                self.assertTrue(bool(((ours[key].float() - wanted[key].float()).abs() <= step * (delta + wanted[key].float().abs())).all()), key)
        self.assertGreater(changed, 0)
        if dtype == torch.float32:  # the adapter beside the model computes the same
            ids = torch.arange(24).reshape(2, 12) % 101
            beside = peft.PeftModel.from_pretrained(kind.from_pretrained(base, dtype=dtype), folder).eval()
            with torch.no_grad():
                a, b = beside(ids).logits, kind.from_pretrained(out, dtype=dtype).eval()(ids).logits
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * float(a.abs().max()))

    def test_all_linear(self):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with self.subTest(dtype):
                self.setUp()
                self.check("llama", dtype, target_modules="all-linear")

    def test_narrow_adapter(self):
        self.check("llama", adapter_dtype=torch.bfloat16, target_modules=["q_proj", "down_proj"])

    def test_rslora_and_patterns(self):
        self.check("qwen3_tied", torch.float32, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True, rank_pattern={"down_proj": 8, r"layers\.1\.self_attn\.q_proj": 2},
                   alpha_pattern={"o_proj": 16, r"^model\.layers\.0\.self_attn\.q.*": 3})

    def test_conv1d(self):
        self.check("gpt2", torch.float32, target_modules=["c_attn", "c_proj", "c_fc"])
        self.setUp()
        self.check("gpt2", target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)

    def test_fused_families(self):
        for name in ("phi3", "gpt_neox"):
            with self.subTest(name):
                self.setUp()
                self.check(name, target_modules="all-linear")

    def test_latent_attention(self):
        self.check("deepseek_v3", torch.float32, target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])

    def test_embedding_and_saved_modules(self):
        self.check("llama", torch.float32, target_modules=["embed_tokens", "v_proj"], modules_to_save=["lm_head"])

    def test_rank_of_several_tiles(self):
        self.check("llama", torch.float32, target_modules=["q_proj", "embed_tokens"], r=9000)
        self.setUp()
        self.check("gpt2", torch.float32, target_modules=["c_fc"], r=9000)

    def test_pickled(self):
        self.check("llama", torch.float32, pickled=True, target_modules=["q_proj"])


if __name__ == "__main__":
    unittest.main()
