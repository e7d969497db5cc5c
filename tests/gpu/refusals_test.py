"""What the real binary says where there is no device, and that the CPU's ways never load the driver."""
import os
import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, run, run_json

LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"
NONE_VISIBLE = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
REASONS = ("no NVIDIA driver was found", "driver found, no device visible", "driver found, but no CUDA-capable device is detected", "this build has no CUDA support", "the driver is for CUDA")


class Refusals(Case):
    def test_cuda_is_refused_with_the_reason(self):
        for device in ("cuda", "cuda:0"):
            for args in (("reshard", LLAMA, self.tmp / "x", "--tp", "1"), ("convert", LLAMA, self.tmp / "x", "--to", "hf"), ("plan", LLAMA, self.tmp / "x", "--tp", "1")):
                err = self.refused(8, *args, "--device", device, env=NONE_VISIBLE)
                self.assertTrue(any(reason in err for reason in REASONS), err)
                self.assertEqual(list(self.tmp.iterdir()), [])

    def test_auto_is_the_cpu_and_says_why(self):
        status, out, err = run("reshard", LLAMA, self.tmp / "x", "--tp", "1", "--device", "auto", "--json", env=NONE_VISIBLE)
        self.assertEqual(status, 0, err)
        self.assertIn('"device": "cpu"', out.replace('":"', '": "'))
        self.assertTrue(any("auto: " + reason in out for reason in REASONS), out)

    def test_the_cpu_never_loads_the_driver(self):
        for args in (("inspect", LLAMA), ("reshard", LLAMA, self.tmp / "x", "--tp", "1"), ("hash", LLAMA)):
            status, _, err = run(*args, env={**os.environ, "LD_DEBUG": "libs"})
            self.assertEqual(status, 0)
            self.assertIn("calling init", err)  # the loader did tell what it loads
            self.assertNotIn("libcuda.so", err)
        status, _, err = run("plan", LLAMA, self.tmp / "z", "--tp", "1", "--device", "auto", env={**os.environ, "LD_DEBUG": "libs"})
        self.assertTrue("libcuda.so" in err or "no CUDA support" in run("plan", LLAMA, self.tmp / "z", "--device", "auto", "--json")[1])  # what would show

    def test_words_that_are_no_device(self):
        for word in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "CUDA", ""):
            self.refused(2, "reshard", LLAMA, self.tmp / "x", "--tp", "1", "--device", word)


if __name__ == "__main__":
    unittest.main()
