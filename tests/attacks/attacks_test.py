"""Bad input as files: each gets one line and a documented status, nothing crashes, nothing is left, no code runs."""
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import sys
import unittest
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, run  # noqa: E402

HOSTILE = DATA / "hostile"
MARKS = [pathlib.Path("/tmp") / f"shardkit_{x}" for x in ("pwned", "escape", "escape2")]


class Runs:
    """Pickles to a call of `touch`."""

    def __reduce__(self):
        return os.system, ("touch /tmp/shardkit_pwned",)


class Manifest(Case):
    def test_every_entry(self):
        for entry in json.loads((HOSTILE / "manifest.json").read_text()):
            with self.subTest(entry["name"]):
                for mark in MARKS:
                    mark.unlink(missing_ok=True)
                status, out, err = run("verify", HOSTILE / entry["path"], "--json", timeout=30)
                self.assertNotIn("Sanitizer", err)
                refused = status in (3, 4, 6, 7) and len(err.strip().splitlines()) == 1
                found = status == 1 and '"error"' in out
                good = {"reject": refused or found, "accept": status == 0, "report": found}.get(entry["verdict"], status == 0 or refused or found)
                self.assertTrue(good, f"{entry['verdict']}: status {status} {err or out}")
                self.assertFalse(any(mark.exists() for mark in MARKS))


class Damaged(Case):
    """Cuts and flips of real files."""

    def every(self, folder, name, changes):
        """Runs inspect and verify on each changed version of one file."""
        path = folder / name
        whole = path.read_bytes()
        for what, data in changes(whole):
            path.write_bytes(data)
            for command in ("inspect", "verify", "hash"):
                status, out, err = run(command, folder, "--json", timeout=60)
                self.assertIn(status, (0, 1, 3, 4, 6, 7), f"{name} {what}: {command}: {status} {err}")
                self.assertNotIn("Sanitizer", err, f"{name} {what}")
                if status not in (0, 1):
                    self.assertEqual(len(err.strip().splitlines()), 1, err)
            target = self.tmp / "target"
            status, _, err = run("convert", folder, target, "--to", "torch_dist", "-q", timeout=60)
            self.assertNotIn("Sanitizer", err)
            self.assertEqual(target.exists(), status == 0, f"{name} {what}")
            shutil.rmtree(target, ignore_errors=True)
        path.write_bytes(whole)

    @staticmethod
    def cuts(count, seed):
        def changes(whole):
            rnd = random.Random(seed)
            for at in sorted({0, 1, 3, len(whole) - 1, len(whole) // 2, *(rnd.randrange(len(whole)) for _ in range(count))}):
                yield f"cut at {at}", whole[:at]
        return changes

    @staticmethod
    def flips(count, seed):
        def changes(whole):
            rnd = random.Random(seed)
            for _ in range(count):
                data = bytearray(whole)
                at = rnd.choice((rnd.randrange(len(data)), rnd.randrange(min(4096, len(data))), len(data) - 1 - rnd.randrange(min(2048, len(data)))))
                data[at] ^= 1 << rnd.randrange(8)
                yield f"flip at {at}", bytes(data)
        return changes

    def test_rank_file(self):
        folder = self.copy("legacy/llama_untied_bf16/tp1pp1")
        self.every(folder, "iter_0000010/mp_rank_00/model_optim_rng.pt", self.cuts(12, 1))
        self.every(folder, "iter_0000010/mp_rank_00/model_optim_rng.pt", self.flips(25, 2))

    def test_metadata(self):
        folder = self.copy("mcore/llama_untied_bf16/tp1pp1")
        self.every(folder, "iter_0000010/.metadata", self.cuts(12, 3))
        self.every(folder, "iter_0000010/.metadata", self.flips(40, 4))

    def test_distcp(self):
        folder = self.copy("mcore/llama_untied_bf16/tp1pp1")
        self.every(folder, "iter_0000010/__0_0.distcp", self.cuts(6, 5))
        self.every(folder, "iter_0000010/__0_0.distcp", self.flips(25, 6))


class Pickles(Case):
    def rank_file(self, value):
        folder = self.tmp / "iter_0000001/mp_rank_00"
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "model_optim_rng.pt", "w") as z:
            z.writestr("a/data.pkl", value if isinstance(value, bytes) else pickle.dumps(value, 2))
            z.writestr("a/version", "3\n")
        return folder.parent

    def test_code_is_never_run(self):
        for mark in MARKS:
            mark.unlink(missing_ok=True)
        for payload in (pickle.dumps(Runs(), 0), pickle.dumps(Runs(), 2), pickle.dumps({"args": Runs()}, 4), b"cos\nsystem\n(S'x'\ntR.",
                        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", b"\x80\x02c__builtin__\neval\n."):
            for command in ("inspect", "verify", "hash"):
                self.refused(4, command, self.rank_file(payload))
        self.assertFalse(MARKS[0].exists())

    def test_bombs(self):
        nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
        self.refused(4, "verify", self.rank_file(nested))
        self.refused(4, "verify", self.rank_file(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x."))
        self.refused(4, "verify", self.rank_file(b"\x80\x02j\xff\xff\xff\xff."))
        cycle = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s."
        self.refused(4, "verify", self.rank_file(cycle))

    def test_compressed_member(self):
        folder = self.tmp / "iter_0000001/mp_rank_00"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "model_optim_rng.pt", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a/data.pkl", b"\0" * 1_000_000)
        self.assertIn("compressed member", self.refused(4, "inspect", folder.parent))


class Paths(Case):
    def test_links_that_lead_out_or_round(self):
        for name in ("dcp/dtensor_2x2",):
            folder = self.copy(name)
            (folder / "__2_0.distcp").rename(self.tmp / "outside.distcp")
            os.symlink(self.tmp / "outside.distcp", folder / "__2_0.distcp")
            self.refused(4, "verify", folder)
            (folder / "__2_0.distcp").unlink()
            os.symlink("__9_0.distcp", folder / "__2_0.distcp")
            os.symlink("__2_0.distcp", folder / "__9_0.distcp")
            self.refused(4, "verify", folder)

    def cache(self, name="models--x--y"):
        """A Hugging Face cache: snapshots of links to blobs."""
        model = self.tmp / name
        snapshot = model / "snapshots/0123abc"
        snapshot.mkdir(parents=True)
        (model / "blobs").mkdir()
        for file in (DATA / "hf/llama_untied_bf16").iterdir():
            shutil.copy(file, model / "blobs" / f"{file.name}.hash")
            os.symlink(f"../../blobs/{file.name}.hash", snapshot / file.name)
        return snapshot

    def test_snapshots_of_a_cache_lead_to_its_blobs_and_nowhere_else(self):
        snapshot = self.cache()
        blobs = snapshot.parent.parent / "blobs"
        (self.tmp / "link").symlink_to(snapshot)
        for command in ("inspect", "verify", "hash", "validate"):
            for path in (snapshot, self.tmp / "link", next(snapshot.glob("model.safetensors*"))):
                self.assertEqual(run(command, path)[0], 0, path)
        self.assertEqual(run("convert", snapshot, self.tmp / "out", "--to", "mp_rank")[0], 0)
        self.assertIn("leads out", self.refused(4, "verify", self.cache("x--y")))  # no such cache
        (self.tmp / "secret").write_text("secret")
        weights = next(snapshot.glob("model*.safetensors"))
        for name in ("config.json", weights.name):
            for link in (self.tmp / "secret", "../../secret", "../../blobs/out", "../../../models--x--other/blobs/a", "../../blobs/below/a"):
                with self.subTest(name, link=link):
                    copy = self.tmp / "models--x--z/snapshots/1"
                    shutil.copytree(snapshot, copy, symlinks=True)
                    shutil.copytree(blobs, copy.parent.parent / "blobs")
                    for other in (copy.parent.parent / "secret", copy.parent.parent / "blobs/below/a", self.tmp / "models--x--other/blobs/a"):
                        other.parent.mkdir(parents=True, exist_ok=True)
                        other.write_text("secret")
                    (copy.parent.parent / "blobs/out").symlink_to(self.tmp / "secret")
                    (copy / name).unlink()
                    (copy / name).symlink_to(link)
                    self.assertIn("leads out", self.refused(4, "validate", copy))
                    shutil.rmtree(copy.parent.parent)
        other = self.cache("models--x--w")
        shutil.move(other.parent.parent / "blobs", self.tmp / "elsewhere")
        (other.parent.parent / "blobs").symlink_to(self.tmp / "elsewhere")
        self.assertIn("leads out", self.refused(4, "verify", other))

    def test_what_is_read_beside_the_weights_lies_there(self):
        (self.tmp / "text").write_text("some text")
        for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
            for target in ("/etc/passwd", name):  # elsewhere, and itself
                with self.subTest(name, target=target):
                    folder = self.copy("hf/llama_untied_bf16")
                    (folder / name).unlink(missing_ok=True)
                    (folder / name).symlink_to(target)
                    self.assertRegex(self.refused(4, "validate", folder, "--text", self.tmp / "text"), "leads out|in a circle")
                    shutil.rmtree(folder)
        folder = self.copy("hf/llama_untied_bf16")
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "generation_config.json").symlink_to("/etc/passwd")
        self.refused(4, "convert", folder, self.tmp / "out", "--to", "mp_rank")
        self.assertFalse((self.tmp / "out").exists())

    def test_fifo_and_folder_in_place_of_a_file(self):
        folder = self.copy("dcp/dtensor_2x2")
        (folder / "__2_0.distcp").unlink()
        os.mkfifo(folder / "__2_0.distcp")
        self.refused(4, "verify", folder)
        (folder / "__2_0.distcp").unlink()
        (folder / "__2_0.distcp").mkdir()
        self.refused(4, "verify", folder)

    def test_unfinished_save(self):
        folder = self.copy("dcp/dtensor_2x2")
        (folder / ".metadata").unlink()
        self.assertIn("unfinished", self.refused(4, "inspect", folder))

    def test_tracker(self):
        folder = self.copy("legacy/llama_untied_bf16/tp1pp1")
        for text, status in (("../../etc", 4), ("", 4), ("99", 3), ("x" * 5000, 4)):
            (folder / "latest_checkpointed_iteration.txt").write_text(text)
            self.refused(status, "inspect", folder)


class SafetensorsHeaders(Case):
    def file(self, header, data=b""):
        path = self.tmp / "model.safetensors"
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        return path

    def test_rules(self):
        good = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        self.ok("verify", self.file(good, b"\0" * 8))
        bad = [
            ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 9),
            ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12),
            ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
            ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
            ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"\0" * 8),
            ({"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
            ({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"\0" * 8),
            ({"w": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
            ({"w": 3}, b""),
            ({"__metadata__": {"a": 3}}, b""),
            (b"[" * 100_000, b""),
            (b'{"w":' + b'{"a":' * 100_000, b""),
            (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0077":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}', b"\0" * 8),
            (b"not json", b""),
            (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,340282366920938463463374607431768211456]}}', b"\0" * 8),
        ]
        for header, data in bad:
            with self.subTest(header=header if isinstance(header, dict) else header[:60]):
                self.refused(4, "verify", self.file(header, data))

    def test_names_are_no_paths(self):
        path = self.file({"../../outside": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
        self.ok("convert", path, self.tmp / "d", "--to", "dcp")
        self.ok("verify", self.tmp / "d")
        self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), ["d", "model.safetensors"])


if __name__ == "__main__":
    unittest.main()
