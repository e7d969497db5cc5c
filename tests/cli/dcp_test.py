"""Plain DCP and torch_dist: what .metadata, args and the names of files say of each other."""
import collections
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import sys
import time
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import Case, DATA, digest, run, run_json  # noqa: E402
from torch_edit import Archive, Persistent, Writer, edit_archive, edit_file, stand_in  # noqa: E402

PLAIN = "dcp/dtensor_2x2"                            # model.a in 2 x 2 chunks, meta.* as bytes items
NESTED = "dcp/fsdp2_adamw_4"
DIST = "mcore/llama_untied_bf16/tp2pp2"              # 4 layers; common state as an item
FILE = "mcore/llama_untied_bf16/tp2pp2vpp2_mcore016"  # in common.pt
MOE = "mcore/moe_bf16/tp1pp2ep2"


def place_of(size):
    """Of a torch.Size."""
    return tuple(size.args[0]) if size.args else ()


def offset_of(index):
    offset = index.state.get("offset")
    return None if offset is None else place_of(offset)


def index_of(root, key, offset=None):
    """The storage_data entry of a key's chunk."""
    return next(i for i in root.state["storage_data"] if i.state["fqn"] == key and offset in (None, offset_of(i)))


class Edited(Case):
    def metadata(self, name, change):
        """A copy of a checkpoint whose .metadata was changed: change(root)."""
        copy = self.copy(name)
        edit_file(next(copy.rglob(".metadata")), change)
        return copy

    def all_refuse(self, status, copy):
        """Whatever reads the tensors."""
        for command in (("hash", copy), ("diff", copy, copy), ("reshard", copy, self.tmp / "out")):
            self.refused(status, *command)
        self.assertFalse((self.tmp / "out").exists())


class Metadata(Edited):
    def test_many_findings_are_counted(self):
        def change(root):
            index = next(iter(root.state["storage_data"]))
            for i in range(20):
                more = type(index)()
                more.called, more.args, more.state = index.called, index.args, dict(index.state, fqn=f"lost{i:02}", offset=None)
                root.state["storage_data"][more] = root.state["storage_data"][index]
        status, out = run_json("verify", self.metadata(PLAIN, change))
        self.assertEqual(status, 1)
        lost = [f for f in out["findings"] if f["rule"] == "coverage"]
        self.assertEqual((len(lost), lost[-1]["message"]), (9, "12 more of this kind"))

    def test_two_items_on_the_same_bytes(self):
        def point(a, b):
            def change(root):
                storage = root.state["storage_data"]
                for name in ("relative_path", "offset", "length"):
                    storage[a(root)].state[name] = storage[b(root)].state[name]
            return change
        layer = "decoder.layers.mlp.linear_fc2.weight"
        for name, change in ((DIST, point(lambda r: index_of(r, layer, (1, 0, 0)), lambda r: index_of(r, layer, (0, 0, 0)))),
                             (DIST, point(lambda r: index_of(r, "output_layer.weight", (0, 0)), lambda r: index_of(r, "embedding.word_embeddings.weight", (0, 0)))),
                             (PLAIN, point(lambda r: index_of(r, "meta.step"), lambda r: index_of(r, "meta.name")))):
            with self.subTest(name):
                copy = self.metadata(name, change)
                self.assertIn("of them, too", self.finding("overlap", copy)["message"])
                self.all_refuse(4, copy)
                shutil.rmtree(self.tmp / "copy")

    def test_items_that_share_a_part(self):
        def change(root):
            storage = root.state["storage_data"]
            storage[index_of(root, "model.a", (0, 0))].state["length"] += 1
        self.finding("overlap", self.metadata(PLAIN, change))

    def test_items_that_nothing_names(self):
        def key(root):
            del root.state["state_dict_metadata"]["model.a"]

        def half(root):
            tensor = root.state["state_dict_metadata"]["model.a"].state
            tensor["size"].args = ((32, tensor["size"].args[0][1]),)
            tensor["chunks"][:] = [c for c in tensor["chunks"] if c.state["offsets"].args[0][0] == 0]

        def object_key(root):
            del root.state["state_dict_metadata"]["meta.step"]
        for change, lost in ((key, "model.a"), (half, "model.a"), (object_key, "meta.step")):
            copy = self.metadata(PLAIN, change)
            found = self.finding("coverage", copy)
            self.assertTrue(found["key"].startswith(lost), found)
            self.all_refuse(4, copy)
            shutil.rmtree(self.tmp / "copy")

    def test_a_chunk_listed_twice(self):
        def change(root):
            chunks = root.state["state_dict_metadata"]["model.a"].state["chunks"]
            chunks.append(chunks[0])
        copy = self.metadata(PLAIN, change)
        self.assertIn("listed twice", self.finding("overlap", copy)["message"])
        self.all_refuse(4, copy)

    def test_a_type_that_is_not_supported_is_named_with_its_key(self):
        def change(root):
            state = root.state["state_dict_metadata"]["model.complex"].state["properties"]
            state.state = (stand_in("torch", "complex32"), *state.state[1:])
        copy = self.metadata(PLAIN, change)
        self.assertIn("model.complex: its dtype complex32 is not supported", self.refused(4, "verify", copy))

    def test_numbers_of_a_stranger_do_not_wrap(self):
        def change(root):
            chunk = root.state["state_dict_metadata"]["model.a"].state["chunks"][0].state
            chunk["offsets"].args = ((2**63 - 1, 0),)
        self.assertIn("[9223372036854775807:9223372036854775807+32", self.refused(4, "verify", self.metadata(PLAIN, change)))

    def test_many_chunks_take_no_time(self):
        """Rows above, columns below: 20,000 chunks of which half begin at one place, whichever way one looks."""
        n = 10_000

        def change(root):
            states, storage = root.state["state_dict_metadata"], root.state["storage_data"]
            tensor, index = states["model.a"], index_of(root, "model.a", (0, 0))
            info = storage[index]
            kinds = type(tensor.state["chunks"][0]), type(index), type(info)
            size = type(tensor.state["size"])
            tensor.state["size"] = size((2 * n, n))
            boxes = [((i, 0), (1, n)) for i in range(n)] + [((n, i), (n, 1)) for i in range(n)]
            root.state.update(state_dict_metadata={"model.a": tensor}, storage_data={})
            tensor.state["chunks"] = []
            for i, (offsets, sizes) in enumerate(boxes):
                chunk, where, what = kinds[0](), kinds[1](), kinds[2]()
                chunk.state = {"offsets": size(offsets), "sizes": size(sizes)}
                where.state = {"fqn": "model.a", "offset": size(offsets), "index": i}
                what.state = {**info.state, "offset": i, "length": 1}
                tensor.state["chunks"].append(chunk)
                root.state["storage_data"][where] = what
        copy = self.metadata(PLAIN, change)
        start = time.monotonic()
        self.ok("inspect", copy)
        self.assertLess(time.monotonic() - start, 10)  # a second where quick, half a minute by pairs


class Objects(Edited):
    """Bytes items: what torch.save wrote, under no key of a tensor."""

    def replaced(self, key, payload):
        """A copy whose bytes item is `payload`, at the end of its file."""
        def change(root):
            info = root.state["storage_data"][index_of(root, key)].state
            path = self.tmp / "copy" / PLAIN / info["relative_path"]
            info["offset"], info["length"] = path.stat().st_size, len(payload)
            path.write_bytes(path.read_bytes() + payload)
        return self.metadata(PLAIN, change)

    def archive(self, payload=b"payload"):
        """A zip as torch.save writes it, with one storage."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in (("archive/data.pkl", pickle.dumps(3, 2)), ("archive/version", b"3\n"), ("archive/data/0", payload)):
                archive.writestr(name, data)
        return out.getvalue()

    def test_what_is_no_archive_or_damaged(self):
        self.ok("verify", self.replaced("meta.step", self.archive()))
        shutil.rmtree(self.tmp / "copy")
        for payload in (b"", b"\0" * 5000, b"random bytes", self.archive().replace(b"payload", b"pAyload", 1)):
            copy = self.replaced("meta.step", payload)
            self.assertEqual(self.finding("checksum", copy)["key"], "meta.step")
            self.assertIn("meta.step", self.refused(4, "convert", copy, self.tmp / "out", "--to", "dcp"))
            self.assertFalse((self.tmp / "out").exists())
            shutil.rmtree(self.tmp / "copy")

    def test_states_of_random_numbers(self):
        copy = self.copy(DIST)
        found = {}
        edit_file(next(copy.rglob(".metadata")), lambda root: found.update({i.state["fqn"]: v.state for i, v in root.state["storage_data"].items()}))
        where = next(v for k, v in found.items() if k.startswith("rng_state"))
        path = next(copy.rglob(where["relative_path"]))
        data = bytearray(path.read_bytes())
        data[where["offset"] + where["length"] // 2] ^= 1
        path.write_bytes(data)
        self.assertTrue(self.finding("checksum", copy)["key"].startswith("rng_state"))

    def test_a_large_item_is_copied_piece_by_piece(self):
        size = 200 << 20
        copy = self.replaced("meta.step", self.archive(bytes(size)))
        self.ok("convert", copy, self.tmp / "out", "--to", "dcp", "--no-sync", "--threads", 1,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)))

    def test_packed_ones_are_carried_unpacked(self):
        """The target names no transform, so that what it holds should be plain."""
        copy, plain = self.copy(PLAIN), {}

        def change(root):
            info = root.state["storage_data"][index_of(root, "meta.step")].state
            path = copy / info["relative_path"]
            data = path.read_bytes()
            plain["bytes"] = data[info["offset"]:info["offset"] + info["length"]]
            size = len(plain["bytes"])  # a zstd frame of one block that is stored as it is
            frame = b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", size - 256) + (size << 3 | 1).to_bytes(3, "little") + plain["bytes"]
            path.write_bytes(data + frame)
            info.update(offset=len(data), length=len(frame), transform_descriptors=["stream.zstd/1"])
        edit_file(copy / ".metadata", change)
        self.ok("verify", copy)
        self.ok("convert", copy, self.tmp / "out", "--to", "dcp")

        def look(root):
            info = root.state["storage_data"][index_of(root, "meta.step")].state
            data = (self.tmp / "out" / info["relative_path"]).read_bytes()
            plain["out"] = data[info["offset"]:info["offset"] + info["length"]]
        edit_file(self.tmp / "out/.metadata", look)
        self.assertEqual(plain["out"], plain["bytes"])

    def test_only_objects(self):
        def change(root):
            states, storage = root.state["state_dict_metadata"], root.state["storage_data"]
            for key in [k for k in states if not k.startswith("meta.")]:
                del states[key]
            for index in [i for i in storage if not i.state["fqn"].startswith("meta.")]:
                del storage[index]
        copy = self.metadata(PLAIN, change)
        self.ok("verify", copy)
        self.ok("convert", copy, self.tmp / "out", "--to", "dcp")
        self.ok("verify", self.tmp / "out")
        self.refused(6, "convert", copy, self.tmp / "hf", "--to", "hf")


class ExtraState(Edited):
    """Bytes that a conversion writes again, with a sum of their own."""

    def tensor(self, storage, size):
        """A uint8 tensor as torch.save writes it."""
        where = Persistent(("storage", stand_in("torch", "ByteStorage"), storage, "cpu", size))
        return stand_in("torch._utils", "_rebuild_tensor_v2")(where, 0, (size,), (1,), False, collections.OrderedDict())

    def test_in_an_item(self):
        for payload, flipped, status in ((b"some state", b"some state", 0), (b"some state", b"sOme state", 4)):
            copy = self.copy(DIST)
            out = io.BytesIO()
            Writer(out, protocol=2).dump([self.tensor("0", len(payload))])
            item = io.BytesIO()
            with zipfile.ZipFile(item, "w", zipfile.ZIP_STORED) as archive:
                for name, data in (("archive/data.pkl", out.getvalue()), ("archive/version", b"3\n"), ("archive/data/0", payload)):
                    archive.writestr(name, data)
            item = item.getvalue().replace(payload, flipped)

            def change(root):
                info = root.state["storage_data"][index_of(root, "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4")].state
                path = next(copy.rglob(info["relative_path"]))
                info["offset"], info["length"] = path.stat().st_size, len(item)
                path.write_bytes(path.read_bytes() + item)
            edit_file(next(copy.rglob(".metadata")), change)
            for command in (("verify", copy), ("reshard", copy, self.tmp / "a", "--tp", 1, "--force"), ("convert", copy, self.tmp / "b", "--to", "mp_rank", "--force")):
                if status:
                    self.assertIn("linear_qkv._extra_state/shard_0_4: extra state: data/0: CRC-32", self.refused(status, *command))
                else:
                    self.ok(*command)
            shutil.rmtree(self.tmp / "copy")

    def test_in_a_rank_file(self):
        key = "decoder.layers.0.self_attention.linear_qkv._extra_state"
        for flipped, status in ((b"some state", 0), (b"sOme state", 4)):
            copy = self.copy("legacy/llama_untied_bf16/tp1pp1")
            path = next(copy.rglob("*.pt"))
            archive = Archive(path)
            archive.root["model"][key] = self.tensor("state", 10)
            archive.records[archive.pickle.replace("data.pkl", "data/state")] = b"some state"
            archive.save()
            path.write_bytes(path.read_bytes().replace(b"some state", flipped))
            for command in (("verify", copy), ("reshard", copy, self.tmp / "a", "--tp", 2, "--force"), ("convert", copy, self.tmp / "b", "--to", "torch_dist", "--force")):
                if status:
                    self.assertIn(key + ": extra state: data/state: CRC-32", self.refused(status, *command))
                else:
                    self.ok(*command)
            shutil.rmtree(self.tmp / "copy")


class Nesting(Edited):
    def paths(self, folder):
        found = {}
        edit_file(folder / ".metadata", lambda root: found.update({"paths": root.state["planner_data"]}))
        return found["paths"]

    def test_paths_are_carried(self):
        source = self.copy(NESTED)
        self.ok("convert", source, self.tmp / "out", "--to", "dcp")
        paths = self.paths(source)
        self.assertTrue(any(len(path) > 2 for path in paths.values()))
        self.assertEqual(self.paths(self.tmp / "out"), paths)

    def test_places_in_lists_and_no_paths(self):
        def listed(root):
            root.state["planner_data"]["model.a"] = ("model", 0, "a")

        def none(root):
            root.state["planner_data"] = None
        for change, a in ((listed, ("model", 0, "a")), (none, None)):
            shutil.rmtree(self.tmp / "copy", ignore_errors=True)
            self.ok("convert", self.metadata(PLAIN, change), self.tmp / "out", "--to", "dcp", "--force")
            paths = self.paths(self.tmp / "out")
            self.assertEqual(paths and paths["model.a"], a)


    def test_paths_that_share_their_steps(self):
        def long(root):
            root.state["planner_data"]["model.a"] = ("model",) * 65

        def shared(root):
            root.state["planner_data"]["model.a"] = ("a" * 200_000,) * 60

        def foreign(root):
            path = ("a" * 100_000,) * 60
            root.state["planner_data"].update({f"k{i}": path for i in range(5_000)})
        self.assertIn("at most 64", self.refused(4, "inspect", self.metadata(PLAIN, long)))
        shutil.rmtree(self.tmp / "copy")
        self.assertIn("their keys are not", self.refused(4, "inspect", self.metadata(PLAIN, shared)))
        shutil.rmtree(self.tmp / "copy")
        self.ok("verify", self.metadata(PLAIN, foreign))


class Alone(Edited):
    """save(use_collectives=False): each rank writes a .metadata of what it holds."""

    def split(self):
        copy = self.copy(PLAIN)
        for rank in range(4):
            def own(root):
                storage, states = root.state["storage_data"], root.state["state_dict_metadata"]
                for index in [i for i, v in storage.items() if not v.state["relative_path"].startswith(f"__{rank}_")]:
                    del storage[index]
                held = {(i.state["fqn"], offset_of(i)) for i in storage}
                for key, value in list(states.items()):
                    if value.state:
                        value.state["chunks"][:] = [c for c in value.state["chunks"] if (key, place_of(c.state["offsets"])) in held]
                    if not any(k == key for k, _ in held):
                        del states[key]
            shutil.copy(DATA / PLAIN / ".metadata", copy / f"__{rank}.metadata")
            edit_file(copy / f"__{rank}.metadata", own)
        os.remove(copy / ".metadata")
        return copy

    def test_ranks_are_read_together(self):
        copy = self.split()
        self.ok("verify", copy)
        self.assertEqual(digest(copy), digest(DATA / PLAIN))
        os.remove(copy / "__2.metadata")
        self.assertIn("no __2.metadata", self.refused(4, "verify", copy))

    def test_ranks_that_contradict_each_other(self):
        def other(root):
            for key in root.state["planner_data"]:
                root.state["planner_data"][key] = ("elsewhere",)
        copy = self.split()
        edit_file(copy / "__1.metadata", other)
        self.assertIn("__1.metadata: planner_data of 'model.", self.refused(6, "verify", copy))

    def test_copies_are_compared(self):
        """What two ranks hold of one tensor are replicas; of other values, copies of which the first is taken and the others named."""
        copy = self.split()
        key, found = "model.bytes", {}
        for rank in range(4):
            def look(root):
                if key in root.state["state_dict_metadata"]:
                    found.update(rank=rank, what=root.state["state_dict_metadata"][key], index=index_of(root, key), info=root.state["storage_data"][index_of(root, key)])
            edit_file(copy / f"__{rank}.metadata", look)
        other = (found["rank"] + 1) % 4
        shutil.copy(copy / found["info"].state["relative_path"], copy / f"__{other}_9.distcp")
        found["info"].state["relative_path"] = f"__{other}_9.distcp"

        def add(root):
            root.state["state_dict_metadata"][key] = found["what"]
            root.state["storage_data"][found["index"]] = found["info"]
        edit_file(copy / f"__{other}.metadata", add)
        status, out = run_json("verify", copy)
        self.assertEqual((status, out["checked"]["replica"]), (0, 1), out["findings"])
        path, where = copy / f"__{other}_9.distcp", found["info"].state
        data = bytearray(path.read_bytes())
        item = bytes(data[where["offset"]:where["offset"] + where["length"]])
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            payload = archive.read("archive/data/0")
        data[where["offset"] + item.index(payload)] ^= 1
        path.write_bytes(data)
        self.assertEqual(self.finding("replica", copy)["key"], key)

    def test_bytes_items_that_differ_are_named(self):
        copy, found = self.split(), {}

        def take(root):
            states = root.state["state_dict_metadata"]
            if "meta.step" in states:
                index = index_of(root, "meta.step")
                found.update(what=states["meta.step"], index=index, info=root.state["storage_data"][index], name=index_of(root, "meta.name"))
                found["name"] = root.state["storage_data"][found["name"]].state["offset"]
        for rank in range(4):
            edit_file(copy / f"__{rank}.metadata", take)
        owner = int(found["info"].state["relative_path"].split("_")[2])
        others = [rank for rank in range(4) if rank != owner]
        for rank, offset in zip(others, (found["info"].state["offset"], found["name"])):  # the same, and another
            shutil.copy(copy / found["info"].state["relative_path"], copy / f"__{rank}_9.distcp")

            def add(root):
                state = dict(found["info"].state, relative_path=f"__{rank}_9.distcp", offset=offset)
                root.state["state_dict_metadata"]["meta.step"] = found["what"]
                root.state["storage_data"][found["index"]] = type(found["info"])()
                root.state["storage_data"][found["index"]].state = state
            edit_file(copy / f"__{rank}.metadata", add)
        status, out = run_json("verify", copy)
        warnings = [f for f in out["findings"] if f["severity"] == "warning"]
        self.assertEqual((status, len(out["findings"]) - len(warnings)), (0, 1), out["findings"])
        self.assertTrue(all(f["key"] == "meta.step" for f in warnings) and warnings, out["findings"])
        status, out = run_json("convert", copy, self.tmp / "out", "--to", "dcp")
        self.assertIn("meta.step", [item["key"] for item in out["dropped"]])


class Shards(Case):
    """torch's HuggingFaceStorageWriter(save_distributed=True), without an index."""

    def write(self, rank, model, of, tensors, extra=()):
        header, data, info = {}, b"", {}
        for key, (shape, offsets, values) in tensors.items():
            raw = struct.pack(f"<{len(values)}f", *values)
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            info[key] = {"saved_offsets": offsets}
            data += raw
        for key in extra:
            info[key] = {"saved_offsets": [0]}
        header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(info)}
        text = json.dumps(header).encode()
        (self.tmp / "hf").mkdir(exist_ok=True)
        (self.tmp / "hf" / f"shard-{rank:05d}-model-{model:05d}-of-{of:05d}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    def whole(self):
        for rank in (1, 2, 3):
            for model, key in ((1, "a"), (2, "b")):
                self.write(rank, model, 2, {key: ([1, 2], [rank - 1, 0], [rank, model])})
        return self.tmp / "hf"

    def test_whole(self):
        self.ok("verify", self.whole())

    def test_a_file_or_a_rank_that_is_missing(self):
        for pattern, key in (("*model-00001*", "shard-*-model-00001-of-00002"), ("*model-00002*", "shard-*-model-00002-of-00002"), ("shard-00001*", "shard-00001-*")):
            folder = self.whole()
            for path in folder.glob(pattern):
                path.unlink()
            status, out = run_json("verify", folder)
            self.assertEqual(status, 1)
            self.assertIn(key, [f["key"] for f in out["findings"] if f["rule"] == "coverage"])
            self.refused(4, "hash", folder)
            shutil.rmtree(folder)

    def test_a_last_part_that_may_be_missing_is_told(self):
        folder = self.whole()
        (folder / "shard-00003-model-00002-of-00002.safetensors").unlink()
        status, out, err = run("hash", folder)
        self.assertEqual(status, 0)
        self.assertIn("is there of 2 ranks, other files of 3", err)

    def test_a_key_without_a_tensor(self):
        folder = self.whole()
        self.write(2, 1, 2, {"a": ([1, 2], [1, 0], [2, 1])}, ["ghost"])
        self.assertEqual(self.finding("missing", folder)["key"], "ghost")
        self.refused(6, "hash", folder)


class Dist(Edited):
    def args(self, name=FILE, **changes):
        """A copy whose common.pt has other args."""
        copy = self.copy(name)
        edit_archive(next(copy.rglob("common.pt")), lambda root: vars(root["args"]).update(changes))
        return copy

    def test_sizes_that_args_cannot_mean(self):
        for name, value in (("tensor_model_parallel_size", 0), ("tensor_model_parallel_size", -2), ("tensor_model_parallel_size", 8), ("tensor_model_parallel_size", 2**40),
                            ("pipeline_model_parallel_size", 3), ("virtual_pipeline_model_parallel_size", 9), ("expert_tensor_parallel_size", 0),
                            ("expert_tensor_parallel_size", -1), ("expert_tensor_parallel_size", 2**63 - 1), ("expert_model_parallel_size", 0)):
            with self.subTest(f"{name} {value}"):
                copy = self.args(**{name: value})
                self.assertTrue(self.finding("rank", copy)["key"].startswith("args."))
                self.all_refuse(6, copy)
                self.refused(6, "convert", copy, self.tmp / "out", "--to", "mp_rank")
                shutil.rmtree(self.tmp / "copy")

    def test_no_layout_loses_weights(self):
        for source, options, status in ((DIST, ("--etp", 2**63 - 1), 5), (DIST, ("--etp", 10**12), 5), (MOE, ("--ep", 1, "--etp", 2), 5)):
            for target in ("torch_dist", "mp_rank"):
                self.refused(status, "convert", DATA / source, self.tmp / "out", "--to", target, *options)
                self.assertFalse((self.tmp / "out").exists())

    def test_a_tied_models_head(self):
        """Args say tied: a head that is stored all the same should be the embedding."""
        copy = self.args(untie_embeddings_and_output_weights=False)
        self.finding("tie", copy)
        self.refused(6, "convert", copy, self.tmp / "out", "--to", "mp_rank")
        self.assertFalse((self.tmp / "out").exists())
        status, out = run_json("inspect", copy)
        self.assertEqual(out["tied"], True)
        self.ok("convert", copy, self.tmp / "out", "--to", "mp_rank", "--drop", "output_layer.weight")

    def test_extra_states_of_all_layers(self):
        def renamed(old, new):
            def change(root):
                states, storage = root.state["state_dict_metadata"], root.state["storage_data"]
                states[new] = states.pop(old)
                storage_key = index_of(root, old)
                storage_key.state["fqn"] = new
            return change

        def without(key):
            def change(root):
                del root.state["state_dict_metadata"][key]
                del root.state["storage_data"][index_of(root, key)]
            return change
        name = "decoder.layers.self_attention.linear_qkv._extra_state/shard_"
        for change, rule in ((without(name + "1_4"), "missing"), (renamed(name + "1_4", name + "7_4"), "unexpected"), (renamed(name + "1_4", name + "1_9"), "unexpected")):
            copy = self.metadata(DIST, change)
            self.assertIn(name, self.finding(rule, copy)["key"])
            self.all_refuse(6, copy)
            shutil.rmtree(self.tmp / "copy")

    def test_two_common_states(self):
        copy = self.copy(DIST)
        shutil.copy(next((DATA / FILE).rglob("common.pt")), next(copy.rglob(".metadata")).parent / "common.pt")
        self.assertIn("common.pt and the item", self.finding("replica", copy)["message"])
        self.all_refuse(6, copy)

    def test_metadata_json(self):
        for text, says in (('{"sharded_backend": "torch_dist", "sharded_backend_version": 2}', "sharded_backend_version is 2; only 1"),
                           ('{"sharded_backend": "torch_dist", "sharded_backend_version": "one"}', "only 1"),
                           ('{"sharded_backend": "torch_dist", "common_backend_version": 9}', "common_backend_version is 9"),
                           ("", "no JSON at line 1"), ("{}", "names no sharded_backend"), ("[1]", "names no sharded_backend")):
            copy = self.copy(FILE)
            next(copy.rglob("metadata.json")).write_text(text)
            self.assertIn(says, self.refused(4, "verify", copy))
            shutil.rmtree(self.tmp / "copy")

    def test_files_that_are_missing_are_named(self):
        copy = self.copy(FILE)
        next(copy.rglob("common.pt")).unlink()
        self.assertIn("neither common.pt nor common_state holds args", self.refused(6, "verify", copy))
        next(copy.rglob(".metadata")).unlink()
        self.assertIn("no .metadata: an unfinished save", self.refused(3, "verify", copy))


if __name__ == "__main__":
    unittest.main()
