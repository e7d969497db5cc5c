"""Times shardkit beside cp, cat and torch, each after the other in every round, and keeps the best of each.
usage: run.py [--rounds N] [WORK_FOLDER]      prints a table in Markdown; needs a Python with torch (SHARDKIT_PEERS_PYTHON)"""
import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARDKIT = os.environ.get("SHARDKIT", str(ROOT / "build/release/bin/shardkit"))
PYTHON = os.environ.get("SHARDKIT_PEERS_PYTHON", str(pathlib.Path.home() / ".cache/shardkit/peers/bin/python"))


def timed(command):
    """Wall seconds and peak resident MiB of one command."""
    start = time.perf_counter()
    pid = os.spawnv(os.P_NOWAIT, shutil.which(command[0]), [str(c) for c in command])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def best(rows, name, value):
    if name not in rows or value[0] < rows[name][0]:
        rows[name] = value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("work", nargs="?", default=str(pathlib.Path.home() / ".cache/shardkit/bench"))
    ask = parser.parse_args()
    work = pathlib.Path(ask.work)
    work.mkdir(parents=True, exist_ok=True)
    ranks, dist, hf, out = work / "mp_rank", work / "torch_dist", work / "hf", work / "out"
    if not ranks.exists():
        subprocess.run([PYTHON, ROOT / "bench/make_model.py", ranks], check=True)
    if not dist.exists():
        subprocess.run([SHARDKIT, "convert", ranks, dist, "--to", "torch_dist", "-q"], check=True)
    if not hf.exists():
        subprocess.run([SHARDKIT, "convert", ranks, hf, "--to", "hf", "-q"], check=True)
    jobs = {
        "reshard mp_rank TP4 → TP2·PP2": (ranks, ["reshard", ranks, out, "--tp", "2", "--pp", "2"], "reshard"),
        "mp_rank → torch_dist": (ranks, ["convert", ranks, out, "--to", "torch_dist"], "to_dist"),
        "torch_dist → mp_rank TP2·PP2": (dist, ["convert", dist, out, "--to", "mp_rank", "--tp", "2", "--pp", "2"], "from_dist"),
        "mp_rank → Hugging Face": (ranks, ["convert", ranks, out, "--to", "hf"], "to_hf"),
        "mp_rank → Hugging Face, one file": (ranks, ["convert", ranks, out, "--to", "hf", "--max-shard-size", "5GB"], "to_hf"),
        "Hugging Face → mp_rank TP2·PP2": (hf, ["convert", hf, out, "--to", "mp_rank", "--tp", "2", "--pp", "2"], "from_hf"),
        "Hugging Face → torch_dist": (hf, ["convert", hf, out, "--to", "torch_dist"], "hf_to_dist"),
    }
    print(f"{platform.machine()}, {os.cpu_count()} cores; best of {ask.rounds} rounds (torch: one); page cache warm; two threads, --no-sync\n")
    print("| job | shardkit | peak | cp -r | ratio | torch | ratio |\n|---|---|---|---|---|---|---|")
    for name, (source, args, script) in jobs.items():
        rows = {}
        for number in range(ask.rounds):
            for what, command in (("cp", ["cp", "-r", source, out]), ("shardkit", [SHARDKIT, *args, "--threads", "2", "--no-sync", "-q"])):
                subprocess.run(f"cat $(find {source} -type f) > /dev/null", shell=True, check=True)
                shutil.rmtree(out, ignore_errors=True)
                best(rows, what, timed(command))
            if number == 0:
                shutil.rmtree(out, ignore_errors=True)
                best(rows, "torch", timed([PYTHON, str(ROOT / "bench/torch_scripts.py"), script, str(source), str(out)]))
        shutil.rmtree(out, ignore_errors=True)
        s, c, t = rows["shardkit"], rows["cp"], rows["torch"]
        print(f"| {name} | {s[0]:.2f} s | {s[1]:.0f} MiB | {c[0]:.2f} s | {s[0] / c[0]:.2f} × | {t[0]:.1f} s, {t[1] / 1024:.1f} GiB | {t[0] / s[0]:.1f} × |", flush=True)
    print("\n| read-only | shardkit | peak | cat > /dev/null | ratio |\n|---|---|---|---|---|")
    for source in (ranks, dist, hf):
        for command in ("hash", "verify"):
            rows = {}
            for _ in range(ask.rounds):
                best(rows, "cat", timed(["sh", "-c", f"cat $(find {source} -type f) > /dev/null"]))
                best(rows, "shardkit", timed(["sh", "-c", f"{SHARDKIT} {command} {source} -q --threads 2 > /dev/null"]))
            s, c = rows["shardkit"], rows["cat"]
            print(f"| {command} {source.name} | {s[0]:.2f} s | {s[1]:.0f} MiB | {c[0]:.2f} s | {s[0] / c[0]:.2f} × |", flush=True)
        rows = {}
        for _ in range(ask.rounds):
            best(rows, "inspect", timed(["sh", "-c", f"{SHARDKIT} inspect {source} --json > /dev/null"]))
        print(f"| inspect {source.name} | {rows['inspect'][0] * 1000:.0f} ms | {rows['inspect'][1]:.0f} MiB | | |", flush=True)
    on_disk(jobs, out)
    hdf5(ranks, work / "hdf5", out, ask.rounds)
    grow(work, out)


def on_disk(jobs, out):
    """With sync: shardkit's default against cp -r and a sync of its files. The disk decides; three rounds."""
    print("\n| until it is on the disk | shardkit | cp -r, sync | ratio |\n|---|---|---|---|")
    for name, (source, args, _) in list(jobs.items())[:3]:
        rows = {}
        for _ in range(3):
            for what, command in (("cp", ["sh", "-c", f"cp -r {source} {out} && find {out} -type f -exec sync {{}} +"]), ("shardkit", [SHARDKIT, *args, "--threads", "2", "-q"])):
                subprocess.run(f"cat $(find {source} -type f) > /dev/null", shell=True, check=True)
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                best(rows, what, timed(command))
        shutil.rmtree(out, ignore_errors=True)
        print(f"| {name} | {rows['shardkit'][0]:.2f} s | {rows['cp'][0]:.2f} s | {rows['shardkit'][0] / rows['cp'][0]:.2f} × |", flush=True)


def hdf5(ranks, stored, out, rounds):
    """HDF5 with zstd level 1 beside what the zstd program does with the same bytes on as many threads."""
    print("\n| HDF5, zstd level 1 | shardkit | peak | zstd program | ratio |\n|---|---|---|---|---|")
    files = f"$(find {ranks} -type f)"
    for threads in (1, 2):
        rows = {}
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            best(rows, "shardkit", timed([SHARDKIT, "convert", ranks, out, "--to", "hdf5", "--no-sync", "-q", "--threads", str(threads)]))
            best(rows, "zstd", timed(["sh", "-c", f"cat {files} | zstd -1 -T{threads} -q -c > {stored}.zst"]))
        s, z = rows["shardkit"], rows["zstd"]
        print(f"| write, {threads} thread{'s'[:threads - 1]} | {s[0]:.2f} s | {s[1]:.0f} MiB | {z[0]:.2f} s | {s[0] / z[0]:.2f} × |", flush=True)
    for threads in (1, 2):
        rows = {}
        for _ in range(rounds):
            best(rows, "shardkit", timed(["sh", "-c", f"{SHARDKIT} hash {out} -q --threads {threads} > /dev/null"]))
            best(rows, "zstd", timed(["sh", "-c", f"zstd -d -q -c {stored}.zst > /dev/null"]))
        s, z = rows["shardkit"], rows["zstd"]
        print(f"| hash, {threads} thread{'s'[:threads - 1]} (zstd -d: one) | {s[0]:.2f} s | {s[1]:.0f} MiB | {z[0]:.2f} s | {s[0] / z[0]:.2f} × |", flush=True)
    pathlib.Path(f"{stored}.zst").unlink()
    shutil.rmtree(out, ignore_errors=True)


def grow(work, out):
    """Tiny tensors, many of them: what planning, metadata and small files cost."""
    print("\n| layers × TP × PP (tiny tensors) | reshard to half the TP | peak | to torch_dist | peak |\n|---|---|---|---|---|")
    for layers, tp, pp in ((16, 8, 2), (160, 8, 2), (16, 16, 8), (100, 64, 4), (96, 64, 16)):
        source = work / f"tiny_{layers}_{tp}_{pp}"
        if not source.exists():
            subprocess.run([PYTHON, ROOT / "bench/make_model.py", "--tiny", source, str(layers), str(tp), str(pp)], check=True)
        cells = []
        for args in (["reshard", source, out, "--tp", str(tp // 2)], ["convert", source, out, "--to", "torch_dist"]):
            shutil.rmtree(out, ignore_errors=True)
            seconds, peak = timed([SHARDKIT, *args, "-q", "--no-sync", "--threads", "2"])
            cells.append(f"{seconds:.2f} s | {peak:.0f} MiB")
        shutil.rmtree(out, ignore_errors=True)
        print(f"| {layers} × {tp} × {pp} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
