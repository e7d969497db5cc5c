"""LoRA adapters as PEFT saves them: listed, checked, copied, merged into their base in every layout; everything else refused by name."""
import json
import pathlib
import shutil
import struct
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from quantised_test import HF, config_of, fp8_folder, packed, tensors, write  # noqa: E402
from support import Case, digest, files_below, run, run_json  # noqa: E402

LLAMA, GPT2, MOE, GEMMA = (HF / x for x in ("llama_untied_bf16", "gpt2_tied_f32", "qwen3_moe_bf16", "gemma2_tied_bf16"))
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None, "bias": "none", "use_dora": False, "task_type": "CAUSAL_LM", "base_model_name_or_path": "somebody/a-model",
          "lora_dropout": 0.05, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None}
PREFIX = "base_model.model."


def numbers(count, seed):
    """Quarters, so that products and sums of a few are exact in f32."""
    out, state = [], seed
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append((state >> 16) % 17 / 4 - 2)
    return out


def values(tensor):
    dtype, _, raw = tensor
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def rounded(numbers, dtype):
    """To f32, and from there to the type, to nearest even."""
    raw = struct.pack(f"<{len(numbers)}f", *numbers)
    if dtype == "F32":
        return raw
    out = bytearray()
    for (bits,) in struct.iter_unpack("<I", raw):
        out += struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return bytes(out)


class Factors:
    """One module's factors, as written and as numbers."""

    def __init__(self, module, rows, columns, rank, seed, dtype="F32", embedding=False):
        self.module, self.rank, self.embedding = module, rank, embedding
        self.a, self.b = numbers(rank * columns, seed), numbers(rows * rank, seed + 1)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        self.held = {f"{PREFIX}{module}.{a}": (dtype, [rank, columns], packed(self.a, dtype)), f"{PREFIX}{module}.{b}": (dtype, [rows, rank], packed(self.b, dtype))}
        self.rows, self.columns = rows, columns

    def product(self, transposed):
        at = [[sum(self.b[o * self.rank + k] * self.a[k * self.columns + i] for k in range(self.rank)) for i in range(self.columns)] for o in range(self.rows)]
        return [at[o][i] for i in range(self.columns) for o in range(self.rows)] if transposed else [x for row in at for x in row]


def adapter(folder, held, **config):
    write(folder, held, {**CONFIG, **config})
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


def factors_for(base, names, rank=4, dtype="F32", conv=False):
    """Factors for every weight of the base whose module ends in one of the names; r = rank."""
    out = []
    for key, (_, shape, _) in tensors(base).items():
        module = key.removesuffix(".weight")
        if module != key and any(module == n or module.endswith("." + n) for n in names):
            embedding = module.endswith(("embed_tokens", "wte"))
            turned = embedding or conv
            rows, columns = reversed(shape) if turned else shape
            out.append(Factors(module, rows, columns, rank, 7 * len(out) + 3, dtype, embedding))
    assert out
    return out


def merged(base, factors, scaling, conv=False):
    """What the base becomes; `scaling` of a module."""
    out = tensors(base)
    for one in factors:
        key = one.module + ".weight"
        dtype, shape, _ = out[key]
        delta = one.product(conv or one.embedding)
        out[key] = dtype, shape, rounded([w + scaling(one.module) * d for w, d in zip(values(out[key]), delta)], dtype)
    return out


def held_by(factors):
    return {key: value for one in factors for key, value in one.held.items()}


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Lora(Case):
    def same(self, folder, wanted):
        got = tensors(folder)
        self.assertEqual(sorted(got), sorted(wanted))
        for key in wanted:
            self.assertEqual(got[key], wanted[key], key)

    def llama(self, names=("q_proj", "v_proj"), dtype="F32", **config):
        factors = factors_for(LLAMA, names, dtype=dtype)
        return adapter(self.tmp / "adapter", held_by(factors), **{"target_modules": list(names), **config}), factors

    def merge(self, base, folder, out, *more):
        self.ok("convert", base, self.tmp / out, "--to", "hf", "--merge-lora", "--adapter", folder, "-q", *more)
        return self.tmp / out

    def test_inspect_and_verify(self):
        folder, factors = self.llama(use_rslora=True)
        status, told = run_json("inspect", folder)
        self.assertEqual((status, told["format"], told["family"]), (0, "hf", None))
        self.assertEqual(told["adapter"], {"type": "lora", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "modules_to_save": [],
                                           "base_model": "somebody/a-model", "modules": len(factors)})
        self.assertEqual(sorted(t["key"] for t in told["tensors"]), sorted(held_by(factors)))
        text = self.ok("inspect", folder)
        for part in ("LoRA, r 4, alpha 8", "rsLoRA", "somebody/a-model", "q_proj, v_proj"):
            self.assertIn(part, text)
        self.ok("verify", folder)

    def test_every_linear_layer_embedding_and_head(self):
        for dtype in ("F32", "BF16"):
            with self.subTest(dtype):
                self.setUp()
                folder, factors = self.llama([*LINEAR, "embed_tokens", "lm_head"], dtype)
                out = self.merge(LLAMA, folder, "out")
                self.same(out, merged(LLAMA, factors, lambda _: 2.0))
                self.assertEqual((out / "config.json").read_bytes(), (LLAMA / "config.json").read_bytes())
                self.ok("verify", out, "-q")

    def test_merge_then_reshard_is_the_same(self):
        for base, names in ((LLAMA, LINEAR), (MOE, ["q_proj", "gate", "experts.1.up_proj", "experts.3.down_proj"])):
            factors = factors_for(base, names)
            folder = adapter(self.tmp / f"{base.name}.adapter", held_by(factors), target_modules=names)
            first = self.merge(base, folder, f"{base.name}.merged")
            self.same(first, merged(base, factors, lambda _: 2.0))
            for number, grid in enumerate((["--to", "mp_rank", "--tp", 2], ["--to", "torch_dist", "--tp", 2, "--pp", 2], ["--to", "mp_rank", "--tp", 4])):
                a, b = self.tmp / f"{base.name}.{number}.a", self.tmp / f"{base.name}.{number}.b"
                self.ok("convert", base, a, *grid, "--merge-lora", "--adapter", folder, "-q", "--threads", 1 + 3 * (number % 2))
                self.ok("convert", first, b, *grid, "-q")
                self.assertEqual(files_below(a), files_below(b))
                self.assertEqual(digest(a), digest(first))

    def test_same_bytes_for_any_threads_and_parts(self):
        folder, _ = self.llama(LINEAR)
        wanted = files_below(self.merge(LLAMA, folder, "one", "--threads", 1))
        self.assertEqual(wanted, files_below(self.merge(LLAMA, folder, "eight", "--threads", 8)))
        self.assertEqual(wanted, files_below(self.merge(LLAMA, folder, "little", "--mem-limit", "1MiB")))
        for part in ("1/2", "2/2"):
            self.merge(LLAMA, folder, "parts", "--part", part)
        self.assertEqual(wanted, files_below(self.tmp / "parts"))

    def test_conv1d_lies_transposed_whatever_the_flag_says(self):
        for flag in (True, False):
            with self.subTest(flag):
                self.setUp()
                factors = factors_for(GPT2, ["c_attn", "c_proj", "c_fc"], conv=True)
                folder = adapter(self.tmp / "adapter", held_by(factors), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=flag)
                self.same(self.merge(GPT2, folder, "out"), merged(GPT2, factors, lambda _: 2.0, conv=True))
        old = {key.removeprefix("transformer."): value for key, value in tensors(GPT2).items()}  # before the prefix
        self.same(self.merge(write(self.tmp / "old", old, config_of(GPT2.name)), folder, "old.out"), merged(GPT2, factors, lambda _: 2.0, conv=True))

    def test_scaling_and_patterns(self):
        cases = [({"use_rslora": True}, lambda m: 4.0),
                 ({"lora_alpha": 2.0}, lambda m: 0.5),
                 ({"alpha_pattern": {"q_proj": 4, "layers.1.self_attn.v_proj": 16}}, lambda m: 1.0 if m.endswith("q_proj") else 4.0 if ".1." in m else 2.0),
                 ({"alpha_pattern": {"model.layers.0.*": 16, ".*q_proj": 4}}, lambda m: 4.0 if ".0." in m else 1.0 if m.endswith("q_proj") else 2.0)]
        for number, (config, scaling) in enumerate(cases):
            with self.subTest(config):
                self.setUp()
                folder, factors = self.llama(**config)
                self.same(self.merge(LLAMA, folder, "out"), merged(LLAMA, factors, scaling))
        self.setUp()
        factors = factors_for(LLAMA, ["q_proj"], rank=4) + factors_for(LLAMA, ["v_proj"], rank=16)
        folder = adapter(self.tmp / "adapter", held_by(factors), target_modules=".*\\.(q|v)_proj", rank_pattern={"v_proj": 16}, use_rslora=True)
        self.same(self.merge(LLAMA, folder, "out"), merged(LLAMA, factors, lambda m: 4.0 if m.endswith("q_proj") else 2.0))

    def test_named_adapter_and_saved_modules(self):
        folder, factors = self.llama(modules_to_save=["lm_head", "norm"])
        held = {key.replace(".weight", ".default.weight"): value for key, value in held_by(factors).items()}
        head, norm = (tensors(LLAMA)[x] for x in ("lm_head.weight", "model.norm.weight"))
        head = "F32", head[1], packed(numbers(len(head[2]) // 2, 9), "F32")
        norm = "BF16", norm[1], packed(numbers(len(norm[2]) // 2, 8), "BF16")
        held |= {PREFIX + "lm_head.modules_to_save.default.weight": head, PREFIX + "model.norm.weight": norm}
        embedding = tensors(LLAMA)["model.embed_tokens.weight"]
        held[PREFIX + "model.embed_tokens.base_layer.weight"] = embedding
        shutil.rmtree(folder)
        folder = adapter(folder, held, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "norm"])
        self.ok("verify", folder)
        wanted = merged(LLAMA, factors, lambda _: 2.0)
        wanted |= {"lm_head.weight": ("BF16", head[1], rounded(values(head), "BF16")), "model.norm.weight": norm}
        self.same(self.merge(LLAMA, folder, "out"), wanted)

    def test_where_the_adapter_lies(self):
        folder, factors = self.llama()
        wanted = merged(LLAMA, factors, lambda _: 2.0)
        both = self.tmp / "both"
        shutil.copytree(LLAMA, both)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / name, both)
        self.ok("convert", both, self.tmp / "a", "--to", "hf", "--merge-lora", "-q")
        self.same(self.tmp / "a", wanted)
        status, told = run_json("convert", both, self.tmp / "b", "--to", "hf")
        self.assertLessEqual({"adapter_config.json", "adapter_model.safetensors"}, {x["key"] for x in told["dropped"]})
        self.same(self.tmp / "b", tensors(LLAMA))
        self.assertIn("--adapter", self.refused(3, "convert", folder, self.tmp / "no", "--to", "hf", "--merge-lora"))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(dict(config, base_model_name_or_path=str(LLAMA))))
        status, told = run_json("convert", folder, self.tmp / "c", "--to", "hf", "--merge-lora")
        self.assertTrue(any(str(LLAMA) in note for note in told["notes"]), told)
        self.same(self.tmp / "c", wanted)
        self.refused(2, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora")
        self.refused(2, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--adapter", folder)
        self.refused(3, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", self.tmp / "nowhere")

    def test_planned_and_proved(self):
        folder, _ = self.llama()
        status, told = run_json("plan", LLAMA, self.tmp / "none", "--to", "hf", "--merge-lora", "--adapter", folder)
        self.assertEqual(status, 0)
        self.assertTrue(any("merged" in note for note in told["notes"]), told)
        out = self.merge(LLAMA, folder, "out", "--report", self.tmp / "receipt.json")
        self.ok("verify", out, "--receipt", self.tmp / "receipt.json", "-q")
        self.assertEqual(run_json("diff", LLAMA, out)[0], 1)

    def test_other_sources_and_types(self):
        folder, factors = self.llama()
        merged_once = self.merge(LLAMA, folder, "out")
        for name in ("dcp", "hdf5"):
            self.ok("convert", LLAMA, self.tmp / name, "--to", name, "-q")
            self.assertEqual(digest(self.merge(self.tmp / name, folder, f"{name}.out")), digest(merged_once))
        wide = self.merge(LLAMA, folder, "wide", "--dtype", "f32")
        self.ok("convert", merged_once, self.tmp / "wide.after", "--to", "hf", "--dtype", "f32", "-q")
        self.assertEqual(digest(wide), digest(self.tmp / "wide.after"))
        self.ok("convert", LLAMA, self.tmp / "dist", "--to", "torch_dist", "-q")
        self.assertIn("hf first", self.refused(4, "convert", self.tmp / "dist", self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder))

    def test_quantised_base_needs_a_type(self):
        base, _ = fp8_folder(self.tmp / "fp8")
        factors = factors_for(base, ["o_proj"])
        folder = adapter(self.tmp / "adapter", held_by(factors), target_modules=["o_proj"])
        self.assertIn("--dtype", self.refused(4, "convert", base, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder))
        self.ok("convert", base, self.tmp / "plain", "--to", "hf", "--dtype", "bf16", "-q")
        self.same(self.merge(base, folder, "out", "--dtype", "bf16"), merged(self.tmp / "plain", factors, lambda _: 2.0))

    def test_ties(self):
        alone = adapter(self.tmp / "alone", held_by(factors_for(GEMMA, ["embed_tokens"])), target_modules=["embed_tokens"])
        self.assertIn("tied", self.refused(4, "convert", GEMMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", alone))
        head = adapter(self.tmp / "head", held_by([Factors("lm_head", 4, 4, 4, 1)]), target_modules=["lm_head"])
        self.refused(6, "convert", GEMMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", head)
        base = tensors(GEMMA)
        base["lm_head.weight"] = base["model.embed_tokens.weight"]  # stored once more: tied all the same
        stored = write(self.tmp / "stored", base, config_of(GEMMA.name))
        self.assertTrue(run_json("inspect", stored)[1]["tied"])
        out = self.merge(stored, alone, "out")
        self.assertIs(json.loads((out / "config.json").read_text())["tie_word_embeddings"], False)
        self.assertEqual(tensors(out)["lm_head.weight"], base["lm_head.weight"])

    def test_copied_as_it_is(self):
        folder, factors = self.llama()
        (folder / "tokenizer.json").write_text("{}")
        self.ok("convert", folder, self.tmp / "out", "--to", "hf", "-q")
        self.assertEqual(sorted(files_below(self.tmp / "out")), ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
        self.assertEqual((folder / "adapter_config.json").read_bytes(), (self.tmp / "out" / "adapter_config.json").read_bytes())
        self.assertEqual(digest(folder), digest(self.tmp / "out"))
        self.ok("convert", folder, self.tmp / "half", "--to", "hf", "--dtype", "bf16", "-q")
        self.assertEqual({t["dtype"] for t in run_json("inspect", self.tmp / "half")[1]["tensors"]}, {"bf16"})
        self.assertEqual(digest(self.merge(LLAMA, self.tmp / "half", "a")), digest(self.merge(LLAMA, folder, "b")))
        for target in ("torch_dist", "mp_rank", "dcp", "hdf5"):
            self.assertIn("--merge-lora", self.refused(4, "convert", folder, self.tmp / "no", "--to", target))

    def test_other_methods_are_refused_by_name(self):
        for number, (name, value) in enumerate({
                "peft_type": "IA3", "use_dora": True, "bias": "all", "lora_bias": True, "layer_replication": [[0, 2]], "megatron_config": {"x": 1}, "target_parameters": ["experts.gate_up_proj"],
                "trainable_token_indices": [1, 2], "use_qalora": True, "alora_invocation_tokens": [1], "arrow_config": {"top_k": 1}, "init_lora_weights": "pissa", "use_something_new": 3}.items()):
            with self.subTest(name):
                folder = adapter(self.tmp / str(number), held_by(factors_for(LLAMA, ["q_proj"])), target_modules=["q_proj"], **{name: value})
                for command in (["inspect", folder], ["verify", folder], ["convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder]):
                    self.assertIn(name, self.refused(4, *command))

    def test_malformed_configurations(self):
        bad = {"r": [None, 0, -1, 2.5, "4", 2**40, True], "lora_alpha": [None, "8", [8], 1e300], "target_modules": [7, [7], {}], "rank_pattern": [3, {"q_proj": 0}, {"q_proj": "x"}],
               "alpha_pattern": [{"q_proj": None}, {"(": 3}], "use_rslora": ["yes"], "peft_type": [None, 4], "modules_to_save": ["norm"], "base_model_name_or_path": [3], "bias": [0], "init_lora_weights": [3]}
        folder, _ = self.llama()
        config = folder / "adapter_config.json"
        for name, wrong in bad.items():
            for value in wrong:
                with self.subTest(name, value=value):
                    config.write_text(json.dumps({**CONFIG, name: value}))
                    self.refused(4, "inspect", folder)
        for text in ("", "[]", "{", '{"r": 1, "r": 2}', "[" * 5000, "\0"):
            config.write_text(text)
            self.refused(4, "verify", folder)
        config.write_text(json.dumps({**CONFIG, "target_modules": "(.*.*.*.*.*.*.*.*)x{1}$"}))
        status, _, err = run("verify", folder)
        self.assertIn(status, (1, 4), err)
        (folder / "adapter_model.safetensors").unlink()
        self.refused(3, "inspect", folder)
        (folder / "adapter_model.bin").write_bytes(b"PK\3\4 but no zip")
        self.refused(4, "inspect", folder)

    def test_factors_that_do_not_fit(self):
        names = ["q_proj", "v_proj"]
        factors = factors_for(LLAMA, names)
        held = held_by(factors)
        first = factors[0]
        a, b = (f"{PREFIX}{first.module}.lora_{x}.weight" for x in "AB")

        def changed(**edit):
            return {**held, **{{"a": a, "b": b}[k]: v for k, v in edit.items()}}

        rank8 = Factors(first.module, first.rows, first.columns, 8, 1).held
        cases = {
            "no B": ("missing", {k: v for k, v in held.items() if k != b}),
            "no A": ("missing", {k: v for k, v in held.items() if k != a}),
            "another rank": ("shape", {**held, **rank8}),
            "ranks that differ": ("shape", changed(b=rank8[b])),
            "one dimension": ("shape", changed(a=("F32", [16], b"\0" * 64))),
            "empty": ("shape", changed(a=("F32", [4, 0], b""))),
            "integers": ("dtype", changed(a=("I32", held[a][1], held[a][2]))),
            "magnitudes": ("unexpected", {**held, f"{PREFIX}{first.module}.lora_magnitude_vector": ("F32", [4], b"\0" * 16)}),
            "biases": ("unexpected", {**held, f"{PREFIX}{first.module}.lora_B.bias": ("F32", [4], b"\0" * 16)}),
            "untargeted": ("unexpected", {**held, **Factors("model.layers.0.self_attn.k_proj", 8, 8, 4, 1).held}),
            "two adapters": ("unexpected", {**held, **{k.replace(".weight", f".{n}.weight"): v for n, k, v in (("x", a, held[a]), ("y", b, held[b]))}}),
            "nothing": ("missing", {}),
        }
        for name, (rule, tensors_) in cases.items():
            with self.subTest(name):
                folder = adapter(self.tmp / name, tensors_, target_modules=names)
                self.finding(rule, folder)
                self.ok("inspect", folder)
                self.refused(6, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder)
                self.refused(6, "convert", folder, self.tmp / "no", "--to", "hf")
        listed = adapter(self.tmp / "listed", held, target_modules=[*names, "query"])
        self.assertIn("query", self.ok("verify", listed))

    def test_patterns_are_expressions(self):
        """As PEFT reads them: a dot fits any letter, also where nothing else of the text is special."""
        for pattern, fits in (("q.proj", True), ("attn.q_proj", False), ("self.attn.q.proj", True), ("q..roj", True), ("q.pro", False), (".proj", False), ("elf.attn.q_proj", False)):
            with self.subTest(pattern):
                self.setUp()
                folder, factors = self.llama(alpha_pattern={pattern: 16})
                self.same(self.merge(LLAMA, folder, "out"), merged(LLAMA, factors, lambda m: 4.0 if fits and m.endswith("q_proj") else 2.0))

    def test_modules_that_the_configuration_leaves_out(self):
        """PEFT would not adapt them: factors are no reason to."""
        cases = [({"target_modules": None}, "target_modules"), ({"target_modules": []}, "target_modules"), ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
                 ({"exclude_modules": ".*v_proj"}, "exclude_modules"), ({"layers_to_transform": [0]}, "layers_to_transform"), ({"layers_to_transform": 1}, "layers_to_transform"),
                 ({"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "blocks"}, "layers_to_transform")]
        for config, what in cases:
            with self.subTest(config):
                self.setUp()
                folder, _ = self.llama(**config)
                self.finding("unexpected", folder)
                self.assertIn(what, self.refused(6, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder))
        layers = list(range(64))
        for config in ({"exclude_modules": ["k_proj"]}, {"layers_to_transform": layers}, {"layers_to_transform": layers, "layers_pattern": ["h", "layers"]}, {"layers_to_transform": []}):
            with self.subTest(config):
                self.setUp()
                folder, factors = self.llama(**config)
                self.same(self.merge(LLAMA, folder, "out"), merged(LLAMA, factors, lambda m: 2.0))
        for config in ({"layers_to_transform": "x"}, {"layers_to_transform": [-1]}, {"layers_to_transform": [0], "layers_pattern": "a|b"}, {"layers_to_transform": [0], "target_modules": ".*q_proj"}):
            with self.subTest(config):
                self.setUp()
                folder, _ = self.llama(**config)
                self.refused(4, "inspect", folder)

    def test_factors_that_do_not_fit_the_base(self):
        shape = tensors(LLAMA)["model.layers.0.self_attn.q_proj.weight"][1]
        cases = [(Factors("model.layers.77.self_attn.q_proj", *shape, 4, 1).held, 6, "layers.77"),
                 (Factors("model.layers.0.self_attn.q_proj", shape[0] + 1, shape[1], 4, 1).held, 6, "shape"),
                 (Factors("model.layers.0.self_attn.query.q_proj", *shape, 4, 1).held, 6, "does not hold"),
                 ({**Factors("model.layers.0.self_attn.q_proj", *shape, 4, 1).held, PREFIX + "score.weight": ("F32", [2, 2], b"\0" * 16)}, 6, "score"),
                 ({**Factors("model.layers.0.self_attn.q_proj", *shape, 4, 1).held, PREFIX + "model.norm.weight": ("F32", [3], b"\0" * 12)}, 6, "shape")]
        for number, (held, status, what) in enumerate(cases):
            with self.subTest(what):
                folder = adapter(self.tmp / str(number), held, target_modules=["q_proj"])
                self.assertIn(what, self.refused(status, "convert", LLAMA, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder))
        unknown = write(self.tmp / "unknown", tensors(LLAMA), {"model_type": "nobody_knows"})
        folder, _ = self.llama()
        self.assertIn("family", self.refused(4, "convert", unknown, self.tmp / "no", "--to", "hf", "--merge-lora", "--adapter", folder))


if __name__ == "__main__":
    unittest.main()
