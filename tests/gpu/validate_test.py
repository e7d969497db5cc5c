"""validate and serve --device cuda against the CPU and against references: every family, precision, attention backend and layout; weights that
are swapped in place under recorded steps; what does not fit, and a device that is lost.

SHARDKIT is a binary whose devices are emulated, or the real one; without a device the real one is skipped with the reason."""
import os
import pathlib
import shutil
import sys
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "cli")]
from serve_test import Server  # noqa: E402
from support import DATA, Case, run, run_json  # noqa: E402

EMULATED = "+emulated" in run("--version")[1]
REFERENCES = DATA / "references"
FAMILIES = sorted(f for f in (DATA / "hf").iterdir() if (f / "reference.safetensors").exists())
DEEPSEEK = next((DATA / "pairs/deepseek_v3_mtp_bf16").glob("tp*"))
DEEPSEEK_REFERENCE = REFERENCES / "pairs_deepseek_v3_mtp_bf16.safetensors"
LLAMA = DATA / "mcore/llama_untied_bf16/tp2pp2"
LLAMA_REFERENCE = REFERENCES / "mcore_llama_untied_bf16.safetensors"
# Of the CPU's losses. In f32 the order of sums alone differs. In bf16 results that lie between two neighbours may go either way; these small random
# models have logits up to 50, where neighbours lie 0.25 apart. In fp8 such a number may fall to the other of two that are an eighth of it apart.
LOSS_BOUND = {"f32": 1e-5, "bf16": 2e-2, "fp8": 0.15}


def environment(**more):
    return {**os.environ, **{f"SHARDKIT_EMULATED_{key}": str(value) for key, value in more.items()}}


class Validate(Case):
    def both(self, checkpoint, *args, compute="f32"):
        """The device's answer, judged against the CPU's."""
        answers = []
        for device in ("cpu", "cuda"):
            status, out = run_json("validate", checkpoint, *args, "--compute", compute, "--device", device)
            self.assertEqual(status, 0, out)
            answers.append(out)
        cpu, cuda = answers
        self.assertTrue(cuda["device"].startswith("cuda:0"), cuda["device"])
        bound = LOSS_BOUND[compute]
        for name in ("loss", "loss_true_vocab"):
            self.assertLess(abs(cpu[name] - cuda[name]), bound, (checkpoint, args, name))
        self.assertEqual(len(cpu["mtp"]), len(cuda["mtp"]))
        for a, b in zip(cpu["mtp"], cuda["mtp"]):
            self.assertLess(abs(a["loss"] - b["loss"]), bound, (checkpoint, args, "mtp"))
        self.assertEqual([a["name"] for a in cpu["activations"]], [b["name"] for b in cuda["activations"]])
        for a, b in zip(cpu["activations"], cuda["activations"]):
            self.assertLess(abs(a["rms"] - b["rms"]), a["rms"] * bound, (checkpoint, args, a["name"]))
        self.assertEqual(cpu["weights"], cuda["weights"])
        return cuda

    def test_every_family(self):
        for family in FAMILIES:
            for compute in LOSS_BOUND:
                self.both(family, "--reference", family / "reference.safetensors", compute=compute)

    def test_every_attention_backend(self):
        for family in FAMILIES:
            for backend in ("local", "flash", "unfused"):
                out = run_json("validate", family, "--reference", family / "reference.safetensors", "--device", "cuda", "--attention-backend", backend)
                self.assertEqual(out[0], 0, out)

    def test_mtp_steps(self):
        for compute in LOSS_BOUND:
            out = self.both(DEEPSEEK, "--reference", DEEPSEEK_REFERENCE, compute=compute)
            self.assertTrue(all(m["step"] for m in out["mtp"]), out["mtp"])

    def test_ranks_on_one_device(self):
        for checkpoint, reference in ((LLAMA, LLAMA_REFERENCE), (DEEPSEEK, DEEPSEEK_REFERENCE)):
            for tp, pp in ((2, 1), (1, 2), (2, 2)):
                for compute in ("f32", "fp8"):
                    self.both(checkpoint, "--reference", reference, "--tp", tp, "--pp", pp, compute=compute)

    def test_the_same_from_run_to_run(self):
        first, second = (run_json("validate", DEEPSEEK, "--device", "cuda", "--compute", "bf16", "--tp", "2")[1] for _ in range(2))
        self.assertEqual((first["loss"], first["mtp"], first["activations"]), (second["loss"], second["mtp"], second["activations"]))

    def test_layouts_give_the_same_bits(self):
        out = self.ok("validate", LLAMA, "--against", DATA / "mcore/llama_untied_bf16/tp1pp1", "--device", "cuda")
        self.assertIn("same bits", out)

    def test_a_server_swaps_weights_under_recorded_steps(self):
        """The third request replays what the second recorded, the fourth with another checkpoint's weights."""
        root = self.tmp / "root"
        root.mkdir()
        for name in ("good", "other"):
            self.ok("convert", DEEPSEEK, root / name, "--to", "hf", "-q")
        shutil.copy(DEEPSEEK_REFERENCE, root / "reference.safetensors")
        # The same shapes with other numbers: the last bit of every fourth weight.
        for file in (root / "other").glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            for at in range(8 + int.from_bytes(content[:8], "little"), len(content), 8):
                content[at] ^= 1
            file.write_bytes(content)
        server = Server("--root", root, "--device", "cuda", history=self.tmp / "history.sqlite")
        try:
            answers = []
            for name in ("good", "good", "good", "other", "good"):
                status, answer = server.validate(checkpoint=name, reference="reference.safetensors")
                answers.append((status, answer))
        finally:
            server.end()
        good = [a for _, a in (answers[0], answers[1], answers[2], answers[4])]
        for answer in good:
            self.assertTrue(answer["ok"], answer)
            self.assertEqual(answer["mtp"], good[0]["mtp"])
            self.assertEqual(answer["loss"], good[0]["loss"])
        self.assertNotEqual(answers[3][1].get("loss"), good[0]["loss"])

    @unittest.skipUnless(EMULATED, "only an emulated device has settable memory")
    def test_what_does_not_fit(self):
        err = self.refused(8, "validate", LLAMA, "--device", "cuda", env=environment(MEMORY=1_000_000))
        self.assertIn("too little", err)
        self.assertIn("would fit", err)
        err = self.refused(8, "validate", LLAMA, "--device", "cuda", env=environment(MEMORY=120_000_000))
        self.assertIn("fewer tokens", err)
        out = self.ok("validate", LLAMA, "--device", "auto", env=environment(MEMORY=1_000_000))  # leaves the choice
        self.assertRegex(out, "device cpu: auto: cuda:0.*: the model takes")
        self.refused(8, "validate", LLAMA, "--device", "auto", "--tf32", env=environment(MEMORY=1_000_000))
        self.assertIn("no device is emulated; cpu is there", self.refused(8, "validate", LLAMA, "--device", "cuda", env=environment(DEVICES=0)))

    @unittest.skipUnless(EMULATED, "only an emulated device is lost when asked to be")
    def test_a_lost_device(self):
        for after in (0, 3, 60):
            for layout in ((), ("--tp", "2", "--pp", "2")):
                err = self.refused(8, "validate", LLAMA, "--device", "cuda", *layout, env=environment(LOST_AFTER=after))
                self.assertIn("lost", err)

    def test_refusals(self):
        self.assertIn("known", self.refused(2, "validate", LLAMA, "--attention-backend", "quick"))
        self.assertIn("CUDA", self.refused(8, "validate", LLAMA, "--attention-backend", "flash"))
        self.assertIn("CUDA", self.refused(8, "validate", LLAMA, "--tf32"))
        self.ok("validate", LLAMA, "--reference", LLAMA_REFERENCE, "--device", "cuda", "--tf32")
        self.refused(6, "validate", LLAMA, "--device", "cuda", "--attention-backend", "flash", env={**os.environ, "NVTE_FLASH_ATTN": "0"})
        self.assertIn("no such device", self.refused(8, "validate", LLAMA, "--device", "cuda:99"))

    def test_auto_says_why(self):
        _, out = run_json("validate", LLAMA, "--device", "auto")
        self.assertTrue(out["device"].startswith("cuda:0"))
        self.assertTrue(any("auto: " in note for note in out["notes"]), out["notes"])


if __name__ == "__main__":
    if not EMULATED:
        status, _, why = run("validate", LLAMA, "--device", "cuda")
        if status == 8:
            print(f"skipped: {why.strip()}")
            sys.exit(77)
    unittest.main()
