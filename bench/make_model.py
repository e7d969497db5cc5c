"""Writes a TinyLlama-shaped model (22 layers, hidden 2048, ffn 5632, 32 heads, 4 query groups, vocabulary 32000; 2.2 GB in bf16) the way
Megatron saves it with TP 4: rank files by torch.save.    usage: make_model.py FOLDER
With --tiny LAYERS TP PP instead: the same keys with a few bytes each, to see how planning grows."""
import argparse
import pathlib
import sys

import torch


def arguments(layers, hidden, ffn, heads, groups, vocab, tp, pp, rank):
    return argparse.Namespace(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=None, expert_model_parallel_size=1,
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, num_query_groups=groups, group_query_attention=True,
        kv_channels=hidden // heads, padded_vocab_size=vocab, vocab_size=vocab, make_vocab_size_divisible_by=1, swiglu=True, normalization="RMSNorm",
        position_embedding_type="rope", untie_embeddings_and_output_weights=True, add_bias_linear=False, add_qkv_bias=False, params_dtype=torch.bfloat16,
        max_position_embeddings=2048, iteration=10, transformer_impl="transformer_engine", world_size=tp * pp, rank=rank)


def write(folder, layers, hidden, ffn, heads, groups, vocab, tp, pp):
    generator = torch.Generator().manual_seed(1)
    head = hidden // heads

    def w(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    run = pathlib.Path(folder)
    target = run / "iter_0000010"
    target.mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    per = layers // pp
    for p in range(pp):
        norms = [(w(hidden), w(hidden)) for _ in range(per)]
        final = w(hidden)
        for t in range(tp):
            model = {}
            if p == 0:
                model["embedding.word_embeddings.weight"] = w(vocab // tp, hidden)
            for i in range(per):
                prefix = f"decoder.layers.{i}."
                model[prefix + "self_attention.linear_proj.weight"] = w(hidden, hidden // tp)
                model[prefix + "self_attention.linear_qkv.weight"] = w((heads + 2 * groups) * head // tp, hidden)
                model[prefix + "self_attention.linear_qkv.layer_norm_weight"] = norms[i][0]
                model[prefix + "mlp.linear_fc1.weight"] = w(2 * ffn // tp, hidden)
                model[prefix + "mlp.linear_fc1.layer_norm_weight"] = norms[i][1]
                model[prefix + "mlp.linear_fc2.weight"] = w(hidden, ffn // tp)
            if p == pp - 1:
                model["decoder.final_layernorm.weight"] = final
                model["output_layer.weight"] = w(vocab // tp, hidden)
            rank = target / (f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}")
            rank.mkdir()
            args = arguments(layers, hidden, ffn, heads, groups, vocab, tp, pp, t + tp * p)
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": model}, rank / "model_optim_rng.pt")


if __name__ == "__main__":
    if sys.argv[1] == "--tiny":
        layers, tp, pp = map(int, sys.argv[3:6])
        write(sys.argv[2], layers, 2 * tp, 2 * tp, tp, tp, tp, tp, pp)
    else:
        write(sys.argv[1], 22, 2048, 5632, 32, 4, 32000, 4, 1)
