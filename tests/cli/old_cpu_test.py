"""The binary on processors of twenty and of ten years ago, as QEMU plays them: no instruction is used that was not asked for."""
import platform
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, digest

LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"


class OldCpu(Case):
    def on(self, cpu, *args):
        done = subprocess.run(["qemu-x86_64", "-cpu", cpu, SHARDKIT, *map(str, args)], capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, 0, f"{cpu}: {args}: {done.stderr}")
        return done.stdout

    def test_every_command(self):
        for cpu in ("qemu64", "Nehalem", "Haswell"):
            self.on(cpu, "convert", LLAMA, self.tmp / cpu, "--to", "hf", "-q")
            self.assertEqual(self.on(cpu, "hash", "-q", self.tmp / cpu).split()[0], digest(LLAMA))
            for compute in ("f32", "bf16"):
                self.on(cpu, "validate", self.tmp / cpu, "--compute", compute, "--threads", "1", "-q")
            self.on(cpu, "verify", LLAMA, "-q")


if __name__ == "__main__":
    if platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"):
        print("skipped: qemu-x86_64 is not here (package qemu-user), or this is no x86-64")
        sys.exit(77)
    unittest.main()
