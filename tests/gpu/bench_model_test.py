"""bench/gpu_model.py on an emulated device and a small model: every figure that needs no other library is there, and the table judges by the goals."""
import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "bench")]
import gpu_model  # noqa: E402
from support import DATA, Case  # noqa: E402

SECONDS = {"seconds": 1.0}
STEPS = {"step": {rows: {"graph": SECONDS, "one_by_one": {"seconds": 3.0}} for rows in ("1", "8")}}
# As a device of 1 s for everything would give it, with the peers' figures at the goals.
AT_GOALS = {
    "ours": {"emulated": False, "products": {"cublaslt": {"seconds": 0.9}, "cublaslt_joined": {"seconds": 0.65}}, "forward": SECONDS, "attention": {"flash": SECONDS},
             **STEPS, "deepseek": STEPS, "deepseek_fp8": {"step": {"1": {"graph": {"seconds": 0.9}, "one_by_one": {"seconds": 3.0}}, "8": STEPS["step"]["8"]}},
             "fp8": {**STEPS, "forward": {"seconds": 0.99}}},
    "torch": {"torch": "", "forward": 1.2, "sdpa": 1 / 1.5, "step": {rows: {"graph": 1.001} for rows in ("1", "8")}},
    "validate": {"wall": 2.5}, "serve": {"next": 0.6}, "loss_bf16": {"cpu": 3.0, "cuda:0": 3.0009}, "loss_f32": {"cpu": 3.0, "cuda:0": 3.00009}}


class BenchModel(Case):
    def verdicts(self, out):
        return [row["verdict"] for row in gpu_model.judged(out)]

    def test_all_figures_of_an_emulated_device(self):
        shutil.copytree(DATA / "hf/llama_untied_bf16", self.tmp / "hf")
        environment = {key: value for key, value in os.environ.items() if key != "SHARDKIT_PEERS_PYTHON"}
        done = subprocess.run([sys.executable, gpu_model.__file__, "--rounds", "1", "--batch", "2", "--length", "16", "--json", str(self.tmp)], capture_output=True, text=True, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr)
        out = json.loads(done.stdout)
        ours = out["ours"]
        for figure in (ours["forward"], ours["products"]["own"], *(ours["attention"][name] for name in ("local", "flash", "unfused")), *(ours["step"][rows][way] for rows in ("1", "8") for way in ("graph", "one_by_one"))):
            self.assertGreater(figure["seconds"], 0)
        config = json.loads((self.tmp / "hf/config.json").read_text())
        hidden, ffn, kv = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
        layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * ffn * hidden
        self.assertEqual(ours["product_flops"], 2 * 32 * (config["num_hidden_layers"] * layer + config["vocab_size"] * hidden))
        self.assertEqual(ours["products"]["cublaslt"], {"why": "the device is emulated"})
        self.assertGreater(out["validate"]["wall"], out["validate"]["seconds"]["forward"])
        self.assertGreater(out["serve"]["next"], 0)
        verdicts = {row["what"]: row["verdict"] for row in out["goals"]}
        self.assertEqual(verdicts.pop("loss against the CPU's, f32"), "met")
        del verdicts["loss against the CPU's, bf16"]  # this model's logits are large
        for what, verdict in verdicts.items():
            self.assertIn(verdict, ("not measured: the device is emulated", "not measured: SHARDKIT_PEERS_PYTHON is not set"), what)
        self.assertIn("| flash attention, of torch's SDPA | ≤ 1.5 × |  | not measured: SHARDKIT_PEERS_PYTHON is not set |", gpu_model.text_of(out))

    def test_goals(self):
        self.assertEqual(set(self.verdicts(AT_GOALS)), {"met"})
        worse = copy.deepcopy(AT_GOALS)
        worse["ours"]["forward"] = worse["ours"]["attention"]["flash"] = {"seconds": 1.01}
        for rows in ("1", "8"):
            for model in ("", "deepseek", "deepseek_fp8", "fp8"):
                (worse["ours"][model] if model else worse["ours"])["step"][rows]["graph"] = {"seconds": 1.01 if model != "deepseek_fp8" else 1.02}
        worse["ours"]["fp8"]["forward"] = {"seconds": 1.02}
        worse.update(validate={"wall": 2.51}, serve={"next": 0.61}, loss_bf16={"cpu": 3.0, "cuda:0": 3.0011}, loss_f32={"cpu": 3.0, "cuda:0": 3.00011})
        self.assertEqual(set(self.verdicts(worse)), {"missed"})

    def test_what_is_missing_says_why(self):
        out = {**AT_GOALS, "torch": {"why": "no torch"}, "serve": {"why": "refused"}}
        self.assertEqual(sum(verdict == "not measured: no torch" for verdict in self.verdicts(out)), 4)
        self.assertEqual(sum(verdict == "not measured: refused" for verdict in self.verdicts(out)), 1)


if __name__ == "__main__":
    unittest.main()
