"""What the tests that drive the binary share: running it, and copying test data to where it can be changed."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

SHARDKIT = os.environ.get("SHARDKIT", "build/release/bin/shardkit")
DATA = pathlib.Path(os.environ.get("SHARDKIT_TEST_DATA", pathlib.Path(__file__).parent / "data"))


def sanitized():
    """Whether the program is one with sanitizers, which need descriptors and memory of their own."""
    return b"__asan_init" in pathlib.Path(SHARDKIT).read_bytes()


def run(*args, timeout=120, **more):
    done = subprocess.run([SHARDKIT, *map(str, args)], capture_output=True, text=True, timeout=timeout, **more)
    return done.returncode, done.stdout, done.stderr


def run_json(*args):
    status, out, err = run(*args, "--json")
    assert out, f"{args}: status {status}: {err}"
    return status, json.loads(out)


def digest(path):
    status, out = run_json("hash", path)
    assert status == 0
    return out["model"]


def files_below(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(pathlib.Path(folder).rglob("*")) if f.is_file()}


class Case(unittest.TestCase):
    """A test with a scratch folder of its own."""

    def setUp(self):
        self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="shardkit-test-"))

    def tearDown(self):
        shutil.rmtree(self.tmp, ignore_errors=True)

    def copy(self, name):
        target = self.tmp / "copy" / name
        shutil.copytree(DATA / name, target)
        return target

    def ok(self, *args, **more):
        status, out, err = run(*args, **more)
        self.assertEqual(status, 0, f"{args}: {err}")
        return out

    def refused(self, status, *args, **more):
        """One line on stderr, the documented status, and the line comes back."""
        got, out, err = run(*args, **more)
        self.assertEqual(got, status, f"{args}: {err or out}")
        self.assertEqual(len(err.strip().splitlines()), 1, err)
        self.assertTrue(err.startswith("shardkit: error: "), err)
        self.assertNotIn("Sanitizer", err)
        return err

    def finding(self, rule, *args):
        """verify finds that rule as an error; the finding comes back."""
        status, out = run_json("verify", *args)
        self.assertEqual(status, 1, out)
        hits = [f for f in out["findings"] if f["rule"] == rule and f["severity"] == "error"]
        self.assertTrue(hits, out["findings"])
        return hits[0]
