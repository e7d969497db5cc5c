"""Resharding on a device against its links, all in one run: kernels beside the device's own copy, and a whole reshard beside the slowest of
reading, uploading, downloading and writing, each measured alone.
usage: gpu_reshard.py [--mib N] [--rounds N] [--tp N] [--device NAME] CHECKPOINT WORK_FOLDER     prints tables in Markdown
SHARDKIT and GPU_RESHARD name the binaries; the checkpoint should not be smaller than a few GB."""
import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDKIT = os.environ.get("SHARDKIT", str(ROOT / "build/release/bin/shardkit"))
RATES = os.environ.get("GPU_RESHARD", str(ROOT / "build/release/bin/gpu_reshard"))
BLOCK = 8 << 20


def on_threads(jobs, work):
    """Seconds that all jobs take on as many threads as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        start = time.perf_counter()
        list(pool.map(work, jobs))
        return time.perf_counter() - start


def blocks(path, size):
    return [(path, at, min(BLOCK, size - at)) for at in range(0, size, BLOCK)]


def read_block(job):
    path, at, size = job
    buffer = bytearray(size)
    with open(path, "rb", buffering=0) as file:
        assert os.preadv(file.fileno(), [buffer], at) == size


def write_block(job):
    path, at, size = job
    descriptor = os.open(path, os.O_WRONLY)
    assert os.pwrite(descriptor, bytes(size), at) == size
    os.close(descriptor)


def reshard(source, target, tp, device):
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run([SHARDKIT, "reshard", source, target, "--tp", str(tp), "--pp", "1", "--weights-only", "--no-sync", "--device", device, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def gb(rate):
    return f"{rate / 1e9:.2f} GB/s"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    ask = parser.parse_args()
    ask.work.mkdir(parents=True, exist_ok=True)
    target, scratch = ask.work / "resharded", ask.work / "scratch"

    done = subprocess.run([RATES, "--mib", str(ask.mib), "--rounds", str(ask.rounds)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rates = json.loads(done.stdout)
    print(f"{rates['device']}: copy {gb(rates['copy'])} (bytes read and written), up {gb(rates['up'])}, down {gb(rates['down'])}; {rates['bytes'] >> 20} MiB, best of {ask.rounds}\n")
    print("| kernel | rate | of the device's copy |\n|---|---|---|")
    for name, kernel in rates["kernels"].items():
        print(f"| {name} | {gb(kernel['rate'])} | {kernel['of_copy']:.0%} |")

    files = [f for f in ask.checkpoint.rglob("*") if f.is_file()]
    reads = [job for f in files for job in blocks(f, f.stat().st_size)]
    best = {}

    def keep(name, seconds):
        best[name] = min(best.get(name, seconds), seconds)

    for _ in range(ask.rounds):
        keep("read", on_threads(reads, read_block))
        on_cpu = reshard(ask.checkpoint, target, ask.tp, "cpu")
        keep("on the CPU", on_cpu["seconds"])
        out = reshard(ask.checkpoint, target, ask.tp, ask.device)
        keep("on the device", out["seconds"])
        scratch.unlink(missing_ok=True)
        scratch.touch()
        os.truncate(scratch, out["bytes_written"])
        keep("write", on_threads(blocks(scratch, out["bytes_written"]), write_block))
    read = sum(f.stat().st_size for f in files) / best["read"]
    write = out["bytes_written"] / best["write"]
    through = out["bytes_through_device"]
    links = {"storage, reading": out["bytes_read"] / read, "storage, writing": out["bytes_written"] / write, "up": through / rates["up"], "down": through / rates["down"]}
    slowest = max(links, key=links.get)
    print(f"\nreshard to TP {ask.tp}: {out['bytes_written'] / 1e9:.3f} GB in {best['on the device']:.3f} s on {out['device']} ({best['on the CPU']:.3f} s on the CPU); {out['device_use']['storage']}")
    print("alone: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in links.items()))
    print(f"the slowest link alone ({slowest}) takes {links[slowest] / best['on the device']:.0%} of that time")
    scratch.unlink()
    shutil.rmtree(target)


if __name__ == "__main__":
    main()
