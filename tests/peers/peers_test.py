"""The real torch, safetensors and megatron-core read what shardkit writes, bit for bit. Runs itself again in the Python
that SHARDKIT_PEERS_PYTHON names; without one the test is skipped, and says so."""
import argparse
import os
import pathlib
import unittest

from peers_python import need

need("torch, safetensors and megatron-core")

from support import DATA, Case, digest, run_json  # noqa: E402

import torch  # noqa: E402

torch.serialization.add_safe_globals([argparse.Namespace])
LEGACY = DATA / "legacy"
DIST = DATA / "mcore"


def iteration(folder):
    return next(pathlib.Path(folder).glob("iter_*"))


class Opaque:
    """Stands for classes of Megatron's that the reference files name."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def lenient_pickle():
    """Unpickles what Megatron itself wrote; its own classes become Opaque."""
    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            try:
                return super().find_class(module, name)
            except Exception:
                return Opaque

    module = types.ModuleType("lenient_pickle")
    module.Unpickler = Unpickler
    return module


def reference(path):
    return torch.load(path, weights_only=False, pickle_module=lenient_pickle())


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


class TorchLoadsRankFiles(Case):
    def test_against_megatrons_own(self):
        pairs = (("gpt_tied_bf16_te_names", "tp1pp1", "tp2pp2vpp2", ["--tp", 2, "--pp", 2, "--vpp", 2]), ("llama_untied_bf16", "tp2pp2vpp2", "tp1pp1", ["--tp", 1, "--pp", 1]),
                 ("llama_tied_bf16", "tp1pp2", "tp2pp2", ["--tp", 2, "--pp", 2]))
        for family, source, wanted, flags in pairs:
            self.ok("reshard", LEGACY / family / source, self.tmp / family, *flags)
            theirs = sorted((LEGACY / family / wanted).rglob("model_optim_rng.pt"))
            ours = sorted((self.tmp / family).rglob("model_optim_rng.pt"))
            self.assertEqual([f.parent.name for f in ours], [f.parent.name for f in theirs])
            for a, b in zip(ours, theirs):
                x, y = torch.load(a, weights_only=True), reference(b)
                rank = int(a.parent.name.split("_")[2])
                self.assertEqual(x["args"].rank, y["args"].rank)
                self.assertEqual(x["args"].tensor_model_parallel_size, y["args"].tensor_model_parallel_size)
                for part in (k for k in y if k.startswith("model")):
                    self.assertEqual(list(x[part]), list(y[part]), "keys, in the order of the modules")
                    for key, tensor in y[part].items():
                        if not isinstance(tensor, torch.Tensor):
                            self.assertEqual(x[part][key], tensor)
                            continue
                        keep = max(0, min(tensor.shape[0], 250 - rank * tensor.shape[0])) if "word_embeddings" in key or key.startswith("output_layer") else None
                        self.assertTrue(same(x[part][key][:keep], tensor[:keep]), f"{a.parent.name} {key}")

    def test_args_name_the_new_type_and_multiple(self):
        for source in (LEGACY / "llama_untied_bf16/tp1pp1", DATA / "hf/llama_untied_bf16"):
            self.ok("convert", source, self.tmp / "f16", "--to", "mp_rank", "--dtype", "f16", "--make-vocab-size-divisible-by", 50, "--force", "-q")
            args = torch.load(next((self.tmp / "f16").rglob("*.pt")), weights_only=True)["args"]
            self.assertEqual((args.params_dtype, args.bf16, args.fp16), (torch.float16, False, True))
            self.assertEqual((args.make_vocab_size_divisible_by, args.padded_vocab_size), (50, 250))

    def test_mmap(self):
        self.ok("reshard", LEGACY / "llama_untied_bf16/tp2pp2", self.tmp / "a", "--tp", 1, "--pp", 1)
        torch.load(next((self.tmp / "a").rglob("*.pt")), weights_only=True, mmap=True)


class TorchLoadsDistributed(Case):
    def load(self, folder):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        reader = dcp.FileSystemReader(str(folder))
        entries = reader.read_metadata().state_dict_metadata
        state = {k: torch.empty(tuple(v.size), dtype=v.properties.dtype) for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        dcp.load(state, storage_reader=reader, no_dist=True)
        return state

    def test_against_megatrons_own(self):
        for family, source, wanted, flags in (("llama_untied_bf16", "tp1pp1", "tp2pp2", ["--tp", 2, "--pp", 2]), ("gpt_tied_bf16_div128", "tp2pp2", "tp1pp1", ["--tp", 1, "--pp", 1])):
            self.ok("reshard", DIST / family / source, self.tmp / family, *flags)
            ours, theirs = self.load(iteration(self.tmp / family)), self.load(iteration(DIST / family / wanted))
            self.assertEqual(set(ours), set(theirs))
            for key in theirs:
                keep = 250 if "word_embeddings" in key or key.startswith("output_layer") else None
                self.assertTrue(same(ours[key][:keep], theirs[key][:keep]), key)

    def keys(self, folder):
        """As torch lists them, without the random state, which belongs to the ranks that wrote it, and args, which we write as common.pt."""
        import torch.distributed.checkpoint as dcp
        return {k for k in dcp.FileSystemReader(str(iteration(folder))).read_metadata().state_dict_metadata if not k.startswith(("rng_state/", "common_state/"))}

    def test_keys_are_the_sources(self):
        """Dense layers and mixtures of one model spell the norm before the MLP differently."""
        for source in ("pairs/deepseek_v3_mtp_bf16/tp1pp2", "pairs/qwen3_moe_bf16/tp1pp1"):
            theirs = self.keys(DATA / source)
            for name, flags in (("reshard", ["--tp", 2, "--pp", 1]), ("reshard", ["--pp", 1, "--ep", 2]), ("convert", ["--to", "torch_dist", "--tp", 1])):
                self.ok(name, DATA / source, self.tmp / "again", *flags, "--force")
                self.assertEqual(self.keys(self.tmp / "again"), theirs)
        self.assertIn("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", self.keys(DATA / "pairs/deepseek_v3_mtp_bf16/tp1pp2"))

    def test_plain(self):
        from safetensors.torch import load_file
        values = load_file(DATA / "dcp/dtensor_2x2.reference.safetensors")
        self.ok("convert", DATA / "dcp/dtensor_2x2", self.tmp / "again", "--to", "dcp")
        state = self.load(self.tmp / "again")
        compared = [k for k in values if k in state]
        self.assertGreater(len(compared), 5)
        for key in compared:
            self.assertTrue(same(state[key], values[key]), key)


class TorchSaves(Case):
    """Plain DCP as torch writes it: lists and dicts, a tensor under two keys, empty ones, without collectives."""

    def state(self):
        w = torch.randn(4, 6)
        return {"emb": w, "head": w, "view": w[1:3], "empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0), "step": 7, "none": None,
                "optim": {"state": [{"exp.avg": torch.ones(3)}, {"exp.avg": torch.zeros(3)}], "groups": [{"lr": 0.1, "params": [0, 1]}]}}

    def same(self, a, b):
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(self.same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(self.same, a, b))
        return a == b

    def loaded(self, folder):
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
        dcp_to_torch_save(folder, self.tmp / "whole.pt")
        return torch.load(self.tmp / "whole.pt", weights_only=False)

    def test_state_dicts_keep_their_form(self):
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        state = self.state()
        dcp.save(state, checkpoint_id=self.tmp / "together", no_dist=True)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(self.tmp / "alone"), use_collectives=False)
            dcp.async_save(state, checkpoint_id=self.tmp / "later").result()
        finally:
            dist.destroy_process_group()
        self.assertTrue((self.tmp / "alone/__0.metadata").exists())
        for name in ("together", "alone", "later"):
            self.ok("verify", self.tmp / name)
            self.ok("convert", self.tmp / name, self.tmp / ("out" + name), "--to", "dcp")
            self.assertTrue(self.same(self.loaded(self.tmp / ("out" + name)), self.loaded(self.tmp / "together")), name)


class SafetensorsLoads(Case):
    def test_same_keys(self):
        from safetensors.torch import load_file
        self.ok("convert", DATA / "dcp/fsdp2_adamw_4", self.tmp / "hf", "--to", "hf")
        state = load_file(self.tmp / "hf/model.safetensors")
        _, out = run_json("inspect", DATA / "dcp/fsdp2_adamw_4")
        self.assertEqual(set(state), {t["key"] for t in out["tensors"]})


class MegatronLoads(Case):
    def test_strict_load_into_given_tensors(self):
        """megatron-core 0.16.1 reads our torch_dist: keys, boxes, objects and common.pt, without a GPU."""
        for name in ("current_device", "synchronize", "set_device"):
            setattr(torch.cuda, name, lambda *a, **k: torch.device("cpu"))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29677", RANK="0", WORLD_SIZE="1")
        import torch.distributed as dist
        dist.init_process_group("gloo")
        try:
            from megatron.core import dist_checkpointing
            from megatron.core.dist_checkpointing import ShardedTensor
            from megatron.core.dist_checkpointing.mapping import ShardedObject
            from torch.distributed.checkpoint import FileSystemReader
            from torch.distributed.checkpoint.metadata import TensorStorageMetadata
            source = LEGACY / "llama_untied_bf16/tp2pp2"
            self.ok("convert", source, self.tmp / "d", "--to", "torch_dist", "--tp", 4, "--pp", 1)
            folder = iteration(self.tmp / "d")
            wanted, state = {}, {}
            for key, entry in FileSystemReader(str(folder)).read_metadata().state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    wanted[key] = entry
                    state[key] = ShardedTensor.from_rank_offsets(key, torch.empty(tuple(entry.size), dtype=entry.properties.dtype))
            layers = wanted["decoder.layers.self_attention.linear_qkv.weight"].size[0]
            for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
                for layer in range(layers):
                    key = f"decoder.layers.{module}._extra_state"
                    state[f"{key}{layer}"] = ShardedObject(key, None, (layers,), (layer,))
            loaded = dist_checkpointing.load(state, str(folder))
            self.assertEqual(loaded["args"].tensor_model_parallel_size, 4)
            whole = reference(next((LEGACY / "llama_untied_bf16/tp1pp1").rglob("*.pt")))["model"]
            for layer in range(layers):
                self.assertTrue(same(loaded["decoder.layers.mlp.linear_fc1.weight"][layer], whole[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]))
                self.assertTrue(same(loaded["decoder.layers.self_attention.linear_qkv.weight"][layer], whole[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]))
        finally:
            dist.destroy_process_group()


class H5py(Case):
    """h5py with hdf5plugin reads our files; we read a plain file that h5py wrote."""

    def test_reads_ours(self):
        import h5py
        import hdf5plugin  # noqa: F401
        from safetensors.torch import load_file
        source = DATA / "hf/gpt_oss_bf16"
        self.ok("convert", source, self.tmp / "x", "--to", "hdf5", "-q")
        weights = load_file(source / "model.safetensors")
        seen = set()

        def look(_, item):
            if isinstance(item, h5py.Dataset) and "name" in item.attrs:
                key = item.attrs["name"]
                self.assertEqual(item.attrs["torch_dtype"], "bfloat16")
                self.assertTrue((item[()].view("int16") == weights[key].view(torch.int16).numpy()).all(), key)
                seen.add(key)

        with h5py.File(self.tmp / "x/model.h5") as file:
            file.visititems(look)
        self.assertEqual(seen, set(weights))

    def test_reads_theirs(self):
        import h5py
        import numpy
        from safetensors.torch import load_file
        values = {"a.f32": numpy.arange(60, dtype="f4").reshape(5, 12), "a.big": numpy.arange(12, dtype=">f8").reshape(3, 4), "b.half": numpy.linspace(0, 1, 9, dtype="f2"),
                  "b.i64": numpy.arange(-3, 4), "b.bool": numpy.array([True, False]), "c.scalar": numpy.float32(2.5), "c.empty": numpy.zeros((0, 4), "f4")}
        with h5py.File(self.tmp / "t.h5", "w") as file:
            for number, (key, value) in enumerate(values.items()):
                chunked = {} if value.ndim == 0 or value.size == 0 else [{}, {"chunks": True}, {"compression": "gzip", "shuffle": True, "fletcher32": True}][number % 3]
                file.create_dataset(key.replace(".", "/"), data=value, **chunked)
            file["link"] = h5py.SoftLink("/a/f32")
            file["text"] = "no tensor"
        self.ok("convert", self.tmp / "t.h5", self.tmp / "out", "--to", "hf", "-q")
        found = load_file(self.tmp / "out/model.safetensors")
        self.assertEqual(set(found), {*values, "link"})
        for key, value in values.items():
            self.assertTrue((found[key].numpy() == value).all(), key)

    def test_types_are_told_by_their_fields(self):
        import h5py
        import numpy
        import torch
        from safetensors.torch import load_file

        def stored(file, type_, values):
            h5py.h5d.create(file.id, b"x", type_, h5py.h5s.create_simple((len(values),))).write(h5py.h5s.ALL, h5py.h5s.ALL, numpy.array(values))

        def floats(fields, bias, size):
            type_ = h5py.h5t.IEEE_F32LE.copy()
            type_.set_fields(*fields)
            type_.set_size(size)
            type_.set_ebias(bias)
            return type_

        def integers(bits, offset):
            type_ = h5py.h5t.STD_I32LE.copy()
            type_.set_precision(bits)
            type_.set_offset(offset)
            return type_

        def named(values, torch_dtype):
            return lambda file: file.create_dataset("x", data=values).attrs.__setitem__("torch_dtype", torch_dtype)

        bits = numpy.array([0x3F80, 0xC000], "u2")
        sixteen = floats((15, 7, 8, 0, 7), 127, 2)
        kept = [(lambda file: stored(file, sixteen, [1.0, -2.0]), torch.bfloat16), (named(bits, "bfloat16"), torch.bfloat16), (named(bits.view("i2"), "bfloat16"), torch.bfloat16)]
        for number, (fill, dtype) in enumerate(kept):
            with h5py.File(self.tmp / f"{number}.h5", "w") as file:
                fill(file)
            self.ok("convert", self.tmp / f"{number}.h5", self.tmp / f"{number}", "--to", "hf", "-q")
            found = load_file(self.tmp / f"{number}/model.safetensors")["x"]
            self.assertEqual((found.dtype, found.tolist()), (dtype, [1.0, -2.0]))
        plain = numpy.arange(4, dtype="f4")
        refused = {"fields": lambda file: stored(file, floats((31, 20, 11, 0, 20), 1023, 4), [1.0]), "bias": lambda file: stored(file, floats((31, 23, 8, 0, 23), 100, 4), [1.0]),
                   "bits": lambda file: stored(file, integers(31, 0), [1]), "offset": lambda file: stored(file, integers(12, 8), [1]), "half as bfloat16": named(bits.view("f2"), "bfloat16"),
                   "too wide": named(plain, "bfloat16"), "no name": named(bits, "torch.bfloat16"), "no text": named(bits, 5), "texts": named(bits, ["bfloat16", "x"]),
                   "complex": lambda file: file.create_dataset("x", data=plain.astype("c8")), "long double": lambda file: file.create_dataset("x", data=plain.astype("longdouble")),
                   "enumeration": lambda file: file.create_dataset("x", (3,), dtype=h5py.enum_dtype({"A": 1}, basetype="i4")), "arrays": lambda file: file.create_dataset("x", (3,), dtype=numpy.dtype(("f4", (2,))))}
        for name, fill in refused.items():
            with self.subTest(name):
                path = self.tmp / f"{name}.h5"
                with h5py.File(path, "w") as file:
                    fill(file)
                    file.create_dataset("w", data=plain)
                status, found = run_json("verify", path)
                self.assertEqual((status, [(f["rule"], f["key"]) for f in found["findings"] if f["severity"] == "error"]), (1, [("dtype", "x")]))
                self.refused(6, "convert", path, self.tmp / "no", "--to", "hf")

    def test_chunks_that_were_never_written(self):
        import h5py
        from safetensors.torch import load_file
        with h5py.File(self.tmp / "t.h5", "w") as file:
            file.create_dataset("x", (4, 6), "f4", chunks=(2, 3), fillvalue=-1.5)[0:2, 0:3] = 1
        self.ok("convert", self.tmp / "t.h5", self.tmp / "out", "--to", "hf", "-q")
        found = load_file(self.tmp / "out/model.safetensors")["x"]
        self.assertEqual(found.tolist(), [[1] * 3 + [-1.5] * 3] * 2 + [[-1.5] * 6] * 2)

    def test_what_leads_out_is_refused(self):
        import h5py
        import numpy
        for number in range(3):
            path = self.tmp / f"{number}.h5"
            with h5py.File(path, "w") as file:
                if number == 0:
                    file["out"] = h5py.ExternalLink("/etc/passwd", "/x")
                elif number == 1:
                    file.create_dataset("x", (4,), "u1", external=[("/etc/passwd", 0, 4)])
                else:
                    file.create_dataset("x", data=numpy.zeros((64, 64)), compression="lzf")
            self.refused(4, "inspect", path)


if __name__ == "__main__":
    unittest.main()
