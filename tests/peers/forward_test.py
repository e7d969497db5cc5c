"""Forward passes of random models that transformers makes, of families and rules that no fixture has: validate must meet their
logits on one rank, on several, and in bf16."""
import unittest

from peers_python import need

need("torch, safetensors and transformers")

from support import Case, run_json  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tests run beside each other


def b(**more):
    return dict(dict(vocab_size=250, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                     max_position_embeddings=64, initializer_range=0.2), **more)


MODELS = {
    "mistral_win": ("Mistral", b(sliding_window=8,head_dim=8)),
    "llama_bias": ("Llama", b(attention_bias=True,mlp_bias=True,rms_norm_eps=1e-3)),
    "llama_linear": ("Llama", b(rope_scaling={"rope_type":"linear","factor":4.0})),
    "llama_dyn": ("Llama", b(max_position_embeddings=16,rope_scaling={"rope_type":"dynamic","factor":4.0})),
    "llama_yarn": ("Llama", b(rope_scaling={"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":16})),
    "llama_3": ("Llama", b(rope_scaling={"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":2.0,"original_max_position_embeddings":24})),
    "gemma": ("Gemma", b(head_dim=16)),
    "gemma2": ("Gemma2", b(head_dim=16,query_pre_attn_scalar=24,sliding_window=8)),
    "gemma3": ("Gemma3Text", b(head_dim=16,query_pre_attn_scalar=24,sliding_window=8,num_hidden_layers=7)),
    "gemma3_scaled": ("Gemma3Text", b(head_dim=16,query_pre_attn_scalar=24,sliding_window=8,num_hidden_layers=7,rope_scaling={"rope_type":"linear","factor":8.0})),
    "phi3": ("Phi3", b(sliding_window=8,pad_token_id=0)),
    "phi3_partial": ("Phi3", b(partial_rotary_factor=0.5,pad_token_id=0)),
    "phi3_long": ("Phi3", b(pad_token_id=0,original_max_position_embeddings=16,rope_scaling={"type":"longrope","short_factor":[1.0,1.1,1.2,1.3],"long_factor":[2.0,3.0,4.0,5.0]})),
    "nemotron": ("Nemotron", b()),
    "qwen2_sw": ("Qwen2", b(use_sliding_window=True,sliding_window=8,max_window_layers=2)),
    "qwen2_moe": ("Qwen2Moe", b(num_experts=6,num_experts_per_tok=3,moe_intermediate_size=40,shared_expert_intermediate_size=48,decoder_sparse_step=2)),
    "qwen2_moe_norm": ("Qwen2Moe", b(num_experts=6,num_experts_per_tok=3,moe_intermediate_size=40,shared_expert_intermediate_size=48,norm_topk_prob=True)),
    "qwen3_moe_mixed": ("Qwen3Moe", b(num_experts=6,num_experts_per_tok=3,moe_intermediate_size=40,mlp_only_layers=[1],head_dim=12)),
    "deepseek_v2": ("DeepseekV2", b(num_key_value_heads=8,q_lora_rank=None,kv_lora_rank=16,qk_nope_head_dim=8,qk_rope_head_dim=4,v_head_dim=6,n_routed_experts=8,num_experts_per_tok=3,moe_intermediate_size=40,n_shared_experts=2,first_k_dense_replace=1,topk_method="greedy",n_group=None,topk_group=None)),
    "deepseek_v2_group": ("DeepseekV2", b(num_key_value_heads=8,q_lora_rank=24,kv_lora_rank=16,qk_nope_head_dim=8,qk_rope_head_dim=4,v_head_dim=6,n_routed_experts=8,num_experts_per_tok=3,moe_intermediate_size=40,n_shared_experts=2,first_k_dense_replace=1,topk_method="group_limited_greedy",n_group=4,topk_group=2,routed_scaling_factor=2.0,rms_norm_eps=1e-3)),
    "deepseek_v3_yarn": ("DeepseekV3", b(num_key_value_heads=8,q_lora_rank=24,kv_lora_rank=16,qk_nope_head_dim=8,qk_rope_head_dim=8,v_head_dim=6,n_routed_experts=8,num_experts_per_tok=4,moe_intermediate_size=40,n_shared_experts=2,first_k_dense_replace=1,n_group=4,topk_group=2,rope_scaling={"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":16,"mscale":0.7,"mscale_all_dim":1.0,"beta_fast":32,"beta_slow":1})),
    "deepseek_v3_nointer": ("DeepseekV3", b(num_key_value_heads=8,q_lora_rank=24,kv_lora_rank=16,qk_nope_head_dim=8,qk_rope_head_dim=8,v_head_dim=6,n_routed_experts=8,num_experts_per_tok=4,moe_intermediate_size=40,n_shared_experts=2,first_k_dense_replace=1,n_group=1,topk_group=1,rope_interleave=False,norm_topk_prob=False)),
    "llama_odd": ("Llama", b(vocab_size=251,hidden_size=56,intermediate_size=72,num_hidden_layers=5,num_attention_heads=7,num_key_value_heads=1,tie_word_embeddings=True)),
    "nemotron_odd_lanes": ("Nemotron", b(head_dim=10)),
    "neox_odd_lanes": ("GPTNeoX", b(rotary_pct=0.7,num_hidden_layers=5,tie_word_embeddings=True)),
    "gpt2_inverse": ("GPT2", dict(vocab_size=250,n_embd=56,n_layer=5,n_head=7,n_positions=64,initializer_range=0.2,scale_attn_by_inverse_layer_idx=True,activation_function="relu")),
    "gemma3_caps": ("Gemma3Text", b(head_dim=10,query_pre_attn_scalar=20,sliding_window=6,attn_logit_softcapping=4.0,final_logit_softcapping=6.0)),
    "qwen2_types": ("Qwen2", b(use_sliding_window=True,sliding_window=7,layer_types=["sliding_attention","full_attention","sliding_attention","full_attention"])),
    "gpt_oss": ("GptOss", b(head_dim=12,num_local_experts=4,num_experts_per_tok=2,sliding_window=8,initializer_range=0.25)),
    "gpt_oss_odd": ("GptOss", b(vocab_size=401,num_hidden_layers=5,head_dim=8,num_local_experts=6,num_experts_per_tok=2,sliding_window=8)),
    "mixtral_sw": ("Mixtral", b(num_local_experts=4,num_experts_per_tok=2,sliding_window=8)),
    "gpt2": ("GPT2", dict(vocab_size=250,n_embd=64,n_layer=4,n_head=4,n_positions=64,n_inner=100,initializer_range=0.2,scale_attn_by_inverse_layer_idx=True)),
    "neox": ("GPTNeoX", dict(vocab_size=250,hidden_size=64,intermediate_size=96,num_hidden_layers=4,num_attention_heads=8,max_position_embeddings=64,initializer_range=0.2,rotary_pct=0.25)),
    "neox_seq": ("GPTNeoX", dict(vocab_size=250,hidden_size=64,intermediate_size=96,num_hidden_layers=4,num_attention_heads=8,max_position_embeddings=64,initializer_range=0.2,use_parallel_residual=False)),
    "qwen3": ("Qwen3", b(head_dim=24,attention_bias=True)),
}


def random_model(name, seed):
    """Norms, biases and sinks away from where they start; a batch for it."""
    torch.manual_seed(seed)
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind + "Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    ids = torch.randint(0, config.vocab_size, (2, 41))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or key.endswith("bias") or "ln_" in key:
                value.add_(torch.randn_like(value) * 0.2)
            elif "sinks" in key:
                value.normal_()
        for key, value in model.named_buffers():
            if "e_score" in key:
                value.normal_(0, 0.3)
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def is_calm(model, inputs, logits):
    """No token is about to go to another expert: that would be another model's answer, and which of the two comes depends on the last bit of a sum."""
    table = model.get_input_embeddings().weight
    kept = table.data.clone()
    moved = 0.0
    for _ in range(8):
        table.data.copy_(kept * (1 + 1e-6 * torch.randn_like(table)))
        moved = max(moved, (model(inputs).logits.float() - logits).abs().max().item())
    table.data.copy_(kept)
    return moved < 1e-2


def reference(name, folder, path):
    """Writes a model and what it computes."""
    with torch.no_grad():
        for seed in range(1, 20):
            model, inputs, labels = random_model(name, seed)
            logits = model(inputs).logits.float()
            if is_calm(model, inputs, logits):
                break
        else:
            raise AssertionError(f"{name}: no calm model")
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)
    model.save_pretrained(folder)
    save_file(dict(input_ids=inputs, labels=labels, logits=logits, loss=loss), path)


class Forward(Case):
    def test_models(self):
        for name in MODELS:
            folder, path = self.tmp / name, self.tmp / f"{name}.reference.safetensors"
            reference(name, folder, path)
            for more, most in (((), 2e-4), (("--tp", 2, "--pp", 2), 2e-4), (("--compute", "bf16"), None)):
                with self.subTest(f"{name} {more}"):
                    status, out = run_json("validate", folder, "--reference", path, *more)
                    if most:
                        self.assertEqual(status, 0, out["checks"])
                        self.assertLess(out["reference"]["max_abs_logits"], most)
                    else:
                        self.assertLess(out["reference"]["mean_abs_loss"], 0.3)


if __name__ == "__main__":
    unittest.main()
