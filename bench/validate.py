"""Times validate beside transformers and oneDNN's products, each after the other in every round, and keeps the best of each.
usage: validate.py [--rounds N] HF_FOLDER ONEDNN_RATE     prints a table in Markdown; bench/validate.sh prepares both"""
import argparse
import json
import math
import os
import pathlib
import random
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDKIT = os.environ.get("SHARDKIT", str(ROOT / "build/release/bin/shardkit"))
TOKENS = 256


def timed(command):
    """Wall seconds, peak resident MiB, peak anonymous MiB (mapped files apart), standard output."""
    start = time.perf_counter()
    child = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    peak, ended = [0], threading.Event()

    def watch():
        while not ended.is_set():
            try:
                text = pathlib.Path(f"/proc/{child.pid}/status").read_text()
                peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]))
            except (OSError, IndexError):
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = status
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"failed: {command}")
    return seconds, usage.ru_maxrss / 1024, peak[0] / 1024, out


def none_or(value, text):
    return "none" if math.isnan(value) else text.format(value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("onednn")
    ask = parser.parse_args()
    config = json.loads((ask.folder / "config.json").read_text())
    shape = [TOKENS, *(config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"))]
    python = os.environ.get("SHARDKIT_PEERS_PYTHON", "python3")
    print(f"| 1 × {TOKENS} tokens | start to verdict | transformers | ratio | forward | transformers' | oneDNN's products alone | share of its rate | on weights as they lie | share | peak | beside mapped files | transformers' peak |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        tokens = pathlib.Path(work) / "tokens.txt"
        numbers = random.Random(0)
        tokens.write_text(" ".join(str(numbers.randrange(config["vocab_size"])) for _ in range(TOKENS + 1)))
        for dtype in ("f32", "bf16"):
            best = {}

            def keep(name, value):
                best[name] = min(best.get(name, value), value)

            for _ in range(ask.rounds):
                seconds, peak, anonymous, out = timed([SHARDKIT, "validate", ask.folder, "--tokens", tokens, "--compute", dtype, "--threads", "2", "--json"])
                keep("ours", seconds), keep("forward", json.loads(out)["seconds"]["forward"]), keep("peak", peak), keep("anonymous", anonymous)
                seconds, peak, _, out = timed([python, ROOT / "bench/transformers_forward.py", ask.folder, dtype, tokens])
                keep("theirs", seconds - json.loads(out)["second"]), keep("their forward", json.loads(out)["forward"]), keep("their peak", peak)
                onednn, stored = map(float, timed([ask.onednn, dtype, *shape])[3].split())  # NaN: it has no such products on this processor
                keep("onednn", onednn), keep("stored", stored)
            b = best
            print(f"| {dtype} | {b['ours']:.2f} s | {b['theirs']:.2f} s | {b['ours'] / b['theirs']:.2f} × | {b['forward']:.2f} s | {b['their forward']:.2f} s | {none_or(b['onednn'], '{:.2f} s')} | "
                  f"{none_or(100 * b['onednn'] / b['forward'], '{:.0f} %')} | {none_or(b['stored'], '{:.2f} s')} | {none_or(100 * b['stored'] / b['forward'], '{:.0f} %')} | {b['peak']:.0f} MiB | {b['anonymous']:.0f} MiB | {b['their peak']:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
