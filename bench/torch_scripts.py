"""The best single-process torch scripts we could write for the same jobs: mapped reads, slices without copies where torch allows them.
usage: torch_scripts.py reshard|to_dist|from_dist SRC DST    (the model of make_model.py; TP 4 in, TP 2 x PP 2 out)"""
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


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    globals()[sys.argv[1]](*sys.argv[2:])
