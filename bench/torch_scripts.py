"""The best single-process torch scripts we could write for the same jobs: mapped reads, slices without copies where torch allows them.
usage: torch_scripts.py reshard|to_dist|from_dist|to_hf|from_hf|hf_to_dist SRC DST    (the model of make_model.py; TP 4 in, TP 2 x PP 2 out)"""
import argparse
import os
import pathlib
import sys

import torch

torch.serialization.add_safe_globals([argparse.Namespace])
AXIS = {"word_embeddings.weight": 0, "linear_qkv.weight": 0, "linear_proj.weight": 1, "linear_fc1.weight": 0, "linear_fc2.weight": 1, "output_layer.weight": 0}


def axis(name):
    return next((a for suffix, a in AXIS.items() if name.endswith(suffix)), None)


def load(source):
    folder = next(pathlib.Path(source).glob("iter_*"))
    return [torch.load(f / "model_optim_rng.pt", mmap=True, weights_only=True) for f in sorted(folder.iterdir())]


def merged(ranks, name):
    parts = [r["model"][name] for r in ranks]
    a = axis(name)
    if a is None or len(parts) == 1:
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([p.chunk(2)[0] for p in parts] + [p.chunk(2)[1] for p in parts])
    return torch.cat(parts, a)


def cut(name, whole, ways, rank):
    a = axis(name)
    if a is None:
        return whole
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(ways)[rank], up.chunk(ways)[rank]])
    return whole.chunk(ways, a)[rank].clone()


def write_ranks(whole, args, target, tp, pp):
    layers = args.num_layers // pp
    for p in range(pp):
        for t in range(tp):
            model = {}
            for name, tensor in whole.items():
                if name.startswith("decoder.layers."):
                    number = int(name.split(".")[2])
                    if number // layers != p:
                        continue
                    local = name.replace(f"layers.{number}.", f"layers.{number - p * layers}.")
                elif (p == 0) != name.startswith("embedding") and not (p == pp - 1 and not name.startswith("embedding")):
                    continue
                else:
                    local = name
                model[local] = cut(name, tensor, tp, t)
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.rank = tp, pp, t + tp * p
            folder = pathlib.Path(target) / "iter_0000010" / (f"mp_rank_{t:02d}_{p:03d}" if pp > 1 else f"mp_rank_{t:02d}")
            folder.mkdir(parents=True)
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 10, "model": model}, folder / "model_optim_rng.pt")


def reshard(source, target):
    ranks = load(source)
    write_ranks({name: merged(ranks, name) for name in ranks[0]["model"]}, ranks[0]["args"], target, 2, 2)


def to_dist(source, target):
    import torch.distributed.checkpoint as dcp
    ranks = load(source)
    layers = ranks[0]["args"].num_layers
    state = {}
    for name in ranks[0]["model"]:
        if not name.startswith("decoder.layers."):
            state[name] = merged(ranks, name)
        elif name.startswith("decoder.layers.0."):
            suffix = name[len("decoder.layers.0."):]
            state["decoder.layers." + suffix] = torch.stack([merged(ranks, f"decoder.layers.{i}.{suffix}") for i in range(layers)])
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target, thread_count=2, sync_files=False), no_dist=True)


def from_dist(source, target):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    folder = next(pathlib.Path(source).glob("iter_*"))
    reader = dcp.FileSystemReader(str(folder))
    entries = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    args = torch.load(folder / "common.pt", weights_only=True)["args"]
    whole = {}
    for name, tensor in state.items():
        if name.startswith("decoder.layers."):
            for i in range(args.num_layers):
                whole[f"decoder.layers.{i}." + name[len("decoder.layers."):]] = tensor[i]
        else:
            whole[name] = tensor
    write_ranks(whole, args, target, 2, 2)


def hf_names(layer):
    m, h = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    return {m + "self_attention.linear_proj.weight": h + "self_attn.o_proj.weight", m + "self_attention.linear_qkv.layer_norm_weight": h + "input_layernorm.weight",
            m + "mlp.linear_fc1.layer_norm_weight": h + "post_attention_layernorm.weight", m + "mlp.linear_fc2.weight": h + "mlp.down_proj.weight"}


ENDS = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight"}


def to_hf(source, target):
    from safetensors.torch import save_file
    ranks = load(source)
    args = ranks[0]["args"]
    groups, head, ratio = args.num_query_groups, args.kv_channels, args.num_attention_heads // args.num_query_groups
    out = {theirs: merged(ranks, ours) for ours, theirs in ENDS.items()}
    for i in range(args.num_layers):
        out.update({theirs: merged(ranks, ours) for ours, theirs in hf_names(i).items()})
        qkv = merged(ranks, f"decoder.layers.{i}.self_attention.linear_qkv.weight").view(groups, ratio + 2, head, -1)
        for letter, part in zip("qkv", (qkv[:, :ratio], qkv[:, ratio], qkv[:, ratio + 1])):
            out[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = part.reshape(-1, args.hidden_size).contiguous()
        gate, up = merged(ranks, f"decoder.layers.{i}.mlp.linear_fc1.weight").chunk(2)
        out[f"model.layers.{i}.mlp.gate_proj.weight"], out[f"model.layers.{i}.mlp.up_proj.weight"] = gate, up
    pathlib.Path(target).mkdir()
    save_file(out, pathlib.Path(target) / "model.safetensors", {"format": "pt"})


def megatron_weights(source):
    import json
    from safetensors import safe_open
    config = json.loads((pathlib.Path(source) / "config.json").read_text())
    groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
    head = config["hidden_size"] // heads
    tensors = {}
    for file in sorted(pathlib.Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys()})
    whole = {ours: tensors[theirs] for ours, theirs in ENDS.items()}
    for i in range(config["num_hidden_layers"]):
        whole.update({ours: tensors[theirs] for ours, theirs in hf_names(i).items()})
        q, k, v = (tensors[f"model.layers.{i}.self_attn.{x}_proj.weight"].view(groups, -1, head, config["hidden_size"]) for x in "qkv")
        whole[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).view(-1, config["hidden_size"])
        whole[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = torch.cat([tensors[f"model.layers.{i}.mlp.gate_proj.weight"], tensors[f"model.layers.{i}.mlp.up_proj.weight"]])
    return whole, argparse.Namespace(num_layers=config["num_hidden_layers"])


def from_hf(source, target):
    whole, args = megatron_weights(source)
    write_ranks(whole, args, target, 2, 2)


def hf_to_dist(source, target):
    import torch.distributed.checkpoint as dcp
    whole, args = megatron_weights(source)
    state = {name: tensor for name, tensor in whole.items() if not name.startswith("decoder.layers.")}
    for name in [n for n in whole if n.startswith("decoder.layers.0.")]:
        suffix = name[len("decoder.layers.0."):]
        state["decoder.layers." + suffix] = torch.stack([whole[f"decoder.layers.{i}.{suffix}"] for i in range(args.num_layers)])
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target, thread_count=2, sync_files=False), no_dist=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    globals()[sys.argv[1]](*sys.argv[2:])
