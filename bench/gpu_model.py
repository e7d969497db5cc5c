"""The language module on a device beside cuBLASLt, torch and the CPU, all in one run: a table of what should hold, with met, missed or why it was not
measured.    usage: gpu_model.py [--rounds N] [--batch N] [--length N] [--device cuda:N] [--json] WORK     WORK/hf is the checkpoint, bf16
SHARDKIT and GPU_MODEL name the binaries, SHARDKIT_PEERS_PYTHON a Python with a CUDA build of torch, and transformers; bench/gpu_model.sh prepares all."""
import argparse
import datetime
import http.client
import json
import os
import pathlib
import platform
import random
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDKIT = os.environ.get("SHARDKIT", str(ROOT / "build/release/bin/shardkit"))
MODEL = os.environ.get("GPU_MODEL", str(ROOT / "build/release/bin/gpu_model"))
CPU_TOKENS = 256  # of one sequence: the CPU takes minutes for all


def output_of(command, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **more)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def or_why(work):
    """What `work` gives, or {"why": …}: one figure that cannot be had does not cost the others."""
    try:
        return work()
    except (SystemExit, OSError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()
        return {"why": text[-1] if text else type(error).__name__}


def driver():
    return output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).strip().splitlines()


def validate(checkpoint, tokens, device, compute, rounds):
    """Of the fastest round, behind one that warms the page cache: wall seconds from start to verdict, and the report."""
    best = None
    for turn in range(-1, rounds):
        start = time.perf_counter()
        report = json.loads(output_of([SHARDKIT, "validate", checkpoint, "--tokens", tokens, "--compute", compute, "--device", device, "--json"]))
        wall = time.perf_counter() - start
        if (turn >= 0 or rounds == 0) and (best is None or wall < best["wall"]):
            best = {"wall": wall, "seconds": report["seconds"], "loss": report["loss"], "device": report["device"], "notes": report["notes"]}
    return best


def serve(work, tokens, device, rounds):
    """Seconds of the first request and of the fastest one behind it."""
    history = work / "gpu_model_history.sqlite"
    history.unlink(missing_ok=True)
    command = [SHARDKIT, "serve", "--listen", "127.0.0.1:0", "--history", str(history), "--root", str(work), "--device", device]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit(server.stderr.read())
        taken = []
        for _ in range(rounds + 1):
            connection = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":", 1)[1]), timeout=600)
            start = time.perf_counter()
            connection.request("POST", "/validate", json.dumps({"checkpoint": "hf", "tokens": tokens.name, "compute": "bf16"}), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            taken.append(time.perf_counter() - start)
            connection.close()
            if reply.status != 200 or not answer.get("ok"):
                raise SystemExit(f"serve: status {reply.status}: {answer}")
        return {"first": taken[0], "next": min(taken[1:])}
    finally:
        server.terminate()
        server.communicate()
        history.unlink(missing_ok=True)


def measure(ask):
    checkpoint = ask.work / "hf"
    config = json.loads((checkpoint / "config.json").read_text())
    numbers = random.Random(0)

    def tokens(name, batch, length):
        path = ask.work / name
        path.write_text("\n".join(" ".join(str(numbers.randrange(config["vocab_size"])) for _ in range(length + 1)) for _ in range(batch)))
        return path

    many, few = tokens("gpu_model_tokens.txt", ask.batch, ask.length), tokens("gpu_model_few.txt", 1, min(CPU_TOKENS, ask.length))
    shape = {"--layers": "num_hidden_layers", "--hidden": "hidden_size", "--ffn": "intermediate_size", "--heads": "num_attention_heads", "--groups": "num_key_value_heads", "--vocab": "vocab_size"}
    flags = [word for flag, key in shape.items() for word in (flag, config[key])]
    index = ask.device.partition(":")[2] or "0"
    out = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "host": platform.node(), "tokens": f"{ask.batch} × {ask.length}",
           "driver": or_why(driver), "ours": json.loads(output_of([MODEL, *flags, "--batch", ask.batch, "--length", ask.length, "--rounds", ask.rounds, "--device", index]))}
    few_rounds = min(ask.rounds, 3)
    out["validate"] = or_why(lambda: validate(checkpoint, many, ask.device, "bf16", few_rounds))
    out["serve"] = or_why(lambda: serve(ask.work, many, ask.device, few_rounds))
    for compute in ("bf16", "f32"):
        out[f"loss_{compute}"] = or_why(lambda: {where: validate(checkpoint, few, where, compute, 0)["loss"] for where in ("cpu", ask.device)})
    python = os.environ.get("SHARDKIT_PEERS_PYTHON")
    out["torch"] = or_why(lambda: json.loads(output_of([python, ROOT / "bench/gpu_torch.py", checkpoint, many, ask.rounds, f"cuda:{index}"]))) if python else {"why": "SHARDKIT_PEERS_PYTHON is not set"}
    return out


class Missing(Exception):
    """Why a figure is not there."""


def figure(out, *path):
    """The number at that place; Missing with the nearest reason on the way."""
    for key in path:
        if "why" in out:
            raise Missing(out["why"])
        if key not in out:
            raise Missing(f"{key} was not measured")
        out = out[key]
    if isinstance(out, dict):
        return figure(out, "seconds")
    return out


def goals(out):
    """(what, the goal in words, its value or Missing, whether the value is good, how the value reads)."""
    def ours(*path):
        return figure(out["ours"], *path)

    def torchs(*path):
        return figure(out["torch"], *path)

    def difference(compute):
        losses = out[f"loss_{compute}"]
        return abs(figure(losses, "cpu") - figure(losses, next(key for key in losses if key != "cpu"))) if "why" not in losses else figure(losses, "cpu")

    def step(rows, other):
        return lambda: ours("step", rows, "graph") / other(rows)

    percent, times, seconds, small = "{:.0%}".format, "{:.2f} ×".format, "{:.2f} s".format, "{:.1e}".format
    rows = [
        ("forward: share of the rate of cuBLASLt's products alone", "≥ 65 %", lambda: min(ours("products", "cublaslt"), ours("products", "cublaslt_joined")) / ours("forward"), lambda x: x >= 0.65, percent),
        ("forward: torch eager with SDPA takes, of ours", "≥ 1.2 ×", lambda: torchs("forward") / ours("forward"), lambda x: x >= 1.2, times),
        ("flash attention, of torch's SDPA", "≤ 1.5 ×", lambda: ours("attention", "flash") / torchs("sdpa"), lambda x: x <= 1.5, times),
    ]
    for count in ("1", "8"):
        rows.append((f"MTP step of {count}: graph, of one by one", "≤ 0.33 ×", step(count, lambda n: ours("step", n, "one_by_one")), lambda x: x <= 1 / 3, times))
        rows.append((f"MTP step of {count}: graph, of torch's graph", "< 1 ×", step(count, lambda n: torchs("step", n, "graph")), lambda x: x < 1, times))
    for model, what in (("deepseek", "DeepSeek-V3's layer (32 experts)"), ("deepseek_fp8", "the same in fp8"), ("fp8", "in fp8")):
        for count in ("1", "8"):
            rows.append((f"MTP step of {count}, {what}: graph, of one by one", "≤ 0.33 ×", lambda model=model, count=count: ours(model, "step", count, "graph") / ours(model, "step", count, "one_by_one"),
                         lambda x: x <= 1 / 3, times))
    rows += [
        ("forward in fp8, of that in bf16", "< 1 ×", lambda: ours("fp8", "forward") / ours("forward"), lambda x: x < 1, times),
        ("MTP step of 1, DeepSeek-V3's layer, in fp8, of that in bf16", "< 1 ×", lambda: ours("deepseek_fp8", "step", "1", "graph") / ours("deepseek", "step", "1", "graph"), lambda x: x < 1, times),
    ]
    return rows + [
        ("validate, start to verdict, warm", "≤ 2.5 s", lambda: figure(out["validate"], "wall"), lambda x: x <= 2.5, seconds),
        ("serve, the next request", "≤ 0.6 s", lambda: figure(out["serve"], "next"), lambda x: x <= 0.6, seconds),
        ("loss against the CPU's, bf16", "≤ 1e-3", lambda: difference("bf16"), lambda x: x <= 1e-3, small),
        ("loss against the CPU's, f32", "≤ 1e-4", lambda: difference("f32"), lambda x: x <= 1e-4, small),
    ]


def judged(out):
    """Rows of the table; an emulated device's times are shown and not judged."""
    rows = []
    for what, goal, value, good, text in goals(out):
        try:
            found = value()
        except Missing as why:
            rows.append({"what": what, "goal": goal, "found": None, "verdict": f"not measured: {why}"})
            continue
        time_of_emulation = out["ours"]["emulated"] and not what.startswith("loss")
        rows.append({"what": what, "goal": goal, "found": text(found), "verdict": "not measured: the device is emulated" if time_of_emulation else "met" if good(found) else "missed"})
    return rows


def text_of(out):
    ours, torch = out["ours"], out["torch"]
    by = f"torch {torch['torch']}, transformers {torch['transformers']}, CUDA {torch['cuda']}, cuDNN {torch['cudnn']}" if "torch" in torch else f"torch: {torch['why']}"
    gpu = "; ".join(out["driver"]) if isinstance(out["driver"], list) else f"nvidia-smi: {out['driver']['why']}"
    lines = [f"{ours['device']} · driver: {gpu} · {ours['notes']} · {by} · {out['host']} · {out['date']}", "",
             f"{out['tokens']} tokens, bf16, {ours['product_flops'] / 1e12:.2f} TFLOP of products; median of {ours['rounds']}", "", "| | seconds | |", "|---|---|---|"]

    def line(what, where, *path):
        try:
            lines.append(f"| {what} | {figure(where, *path):.6f} | |")
        except Missing as why:
            lines.append(f"| {what} | | {why} |")

    line("forward", ours, "forward")
    for name in ("cublaslt", "cublaslt_joined", "own"):
        line(f"products alone, {name.replace('_', ', ')}", ours, "products", name)
    for name in ("local", "flash", "unfused", "fused"):
        line(f"attention, {name}", ours, "attention", name)
    for rows in ("1", "8"):
        line(f"MTP step of {rows}, graph", ours, "step", rows, "graph")
        line(f"MTP step of {rows}, one by one", ours, "step", rows, "one_by_one")
        line(f"MTP step of {rows}, torch eager", torch, "step", rows, "eager")
        line(f"MTP step of {rows}, torch graph", torch, "step", rows, "graph")
    line("torch forward", torch, "forward")
    line("torch SDPA", torch, "sdpa")
    line("validate, start to verdict", out["validate"], "wall")
    line("validate, its forward", out["validate"], "seconds", "forward")
    line("serve, first request", out["serve"], "first")
    line("serve, next request", out["serve"], "next")
    lines += ["", "| what | goal | found | |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['goal']} | {row['found'] or ''} | {row['verdict']} |" for row in judged(out)]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("work", type=pathlib.Path)
    ask = parser.parse_args()
    ask.work = ask.work.resolve()
    out = measure(ask)
    print(json.dumps({**out, "goals": judged(out)}, ensure_ascii=False, indent=1) if ask.json else text_of(out))


if __name__ == "__main__":
    main()
