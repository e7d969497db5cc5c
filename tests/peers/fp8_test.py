"""validate --compute fp8 beside torch: models whose layers' linears see both sides in float8_e4m3fn, a scale for each 128 lanes of an activation and
each 128 × 128 of a weight. Weights come from bf16, and from Hugging Face files that hold such numbers and scales already. Sequences have one token: behind a
softmax many numbers round to the other side, and in e4m3 those lie far apart."""
import json
import unittest

from peers_python import need

need("torch, safetensors and transformers")

from support import Case, run_json  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
BLOCK, LARGEST = 128, 448.0
DENSE = dict(vocab_size=250, hidden_size=320, intermediate_size=400, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64)
MODELS = {
    "llama": ("Llama", dict(DENSE, mlp_bias=True)),
    "qwen2": ("Qwen2", DENSE),
    "phi3": ("Phi3", dict(DENSE, hidden_size=256, intermediate_size=384, pad_token_id=0)),  # fused linears, whose parts begin with a block
    "deepseek_v3": ("DeepseekV3", dict(DENSE, num_key_value_heads=8, q_lora_rank=150, kv_lora_rank=140, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=20, first_k_dense_replace=3, n_routed_experts=0)),
}


def blocks_of(x, rows):
    """The number of each element's block, [rows, columns] → one for each row or BLOCK rows, and BLOCK columns."""
    r, c = (torch.arange(n) for n in x.shape)
    return (r // rows)[:, None] * (-(-x.shape[1] // BLOCK)) + (c // BLOCK)[None, :]


def quantised(x, rows):
    """Numbers in float8_e4m3fn and each element's scale."""
    block = blocks_of(x, rows)
    most = torch.zeros(int(block.max()) + 1).scatter_reduce(0, block.flatten(), x.abs().flatten(), "amax")
    scales = torch.where(most > 0, most / LARGEST, torch.ones(()))[block]
    return (x / scales).to(torch.float8_e4m3fn), scales


class Linear(torch.nn.Module):
    def __init__(self, numbers, scales, bias):
        super().__init__()
        self.weight, self.bias = numbers.float() * scales, bias

    def forward(self, x):
        numbers, scales = quantised(x.flatten(0, -2).float(), 1)
        y = (numbers.float() * scales) @ self.weight.T
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype).unflatten(0, x.shape[:-1])


def replace_linears(model, make):
    """Of the layers, by what make(name, linear) gives."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, Linear(*make(f"model.layers.{name}.weight", module), module.bias))


class Fp8(Case):
    def model(self, name):
        torch.manual_seed(3)
        kind, sizes = MODELS[name]
        config = getattr(transformers, kind + "Config")(**sizes, initializer_range=0.05)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "norm" in key or key.endswith("bias"):
                    value.add_(torch.randn_like(value) * 0.2)
        return model.to(torch.bfloat16)

    def closeness(self, folder, logits, ids, *more):
        path = self.tmp / "reference.safetensors"
        save_file(dict(input_ids=ids, labels=ids.roll(-1, 1), logits=logits.float(), loss=torch.zeros(ids.shape)), path)
        return run_json("validate", folder, "--reference", path, "--compute", "fp8", *more)[1]["reference"]["mean_abs_logits"]

    def test_weights_from_bf16(self):
        """Closer to torch in fp8 by far than that is to torch in bf16."""
        ids = torch.randint(0, 250, (80, 1), generator=torch.Generator().manual_seed(1))
        for name in MODELS:
            with self.subTest(name), torch.no_grad():
                model, folder = self.model(name), self.tmp / name
                model.save_pretrained(folder)
                plain = model(ids).logits.float()
                replace_linears(model, lambda _, linear: quantised(linear.weight.float(), BLOCK))
                logits = model(ids).logits.float()
                effect = (logits - plain).abs().mean().item()
                found = self.closeness(folder, logits, ids)
                self.assertLess(found, effect / 10)

    def test_weights_from_fp8(self):
        """The stored numbers and scales are taken: closer to them by far than those with scales found anew."""
        ids = torch.randint(0, 250, (80, 1), generator=torch.Generator().manual_seed(1))
        for name in MODELS:
            with self.subTest(name), torch.no_grad():
                model, folder = self.model(name), self.tmp / f"{name}_fp8"
                model.save_pretrained(folder)
                held, stored = load_file(folder / "model.safetensors"), {}
                # Scales that are powers of two, so that no block's largest number is 448: finding scales anew would give other numbers.
                for key, value in list(held.items()):
                    if not (key.startswith("model.layers.") and value.dim() == 2) or "mlp.gate.weight" in key:
                        continue
                    _, scales = quantised(value.float(), BLOCK)
                    scales = torch.exp2(torch.ceil(torch.log2(scales)))
                    stored[key] = (value.float() / scales).to(torch.float8_e4m3fn), scales
                    held[key] = stored[key][0]
                    held[key + "_scale_inv"] = scales[::BLOCK, ::BLOCK].contiguous()
                save_file(held, folder / "model.safetensors")
                config = json.loads((folder / "config.json").read_text())
                config["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK])
                (folder / "config.json").write_text(json.dumps(config))
                again = self.model(name)
                replace_linears(again, lambda key, _: quantised(stored[key][0].float() * stored[key][1], BLOCK))
                replace_linears(model, lambda key, _: stored[key])
                logits = model(ids).logits.float()
                effect = (again(ids).logits.float() - logits).abs().mean().item()
                found = self.closeness(folder, logits, ids)
                self.assertLess(found, effect / 10)


if __name__ == "__main__":
    unittest.main()
