"""cuBLASLt, cuDNN and NCCL themselves, as Python packages bring them: every entry point resolves, and cuDNN takes our graph for devices that are
described to it. The toolkit's stub stands for the driver, so that no kernel runs."""
import os
import pathlib
import subprocess
import sys
import tempfile

from peers_python import need, skip


def main(program, stub):
    need("NVIDIA's packages")
    packages = [path for root in sys.path for path in [pathlib.Path(root) / "nvidia"] if path.is_dir()]
    found = {name: next((str(f) for p in packages for f in sorted(p.glob(f"*/lib/{file}"))), None)
             for name, file in (("SHARDKIT_CUBLASLT", "libcublasLt.so.13"), ("SHARDKIT_CUDNN", "libcudnn.so.9"), ("SHARDKIT_NCCL", "libnccl.so.2"))}
    if None in found.values() or not pathlib.Path(stub).is_file():
        skip(f"not all of NVIDIA's libraries are here: {found}, the driver's stub {stub}")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "libcuda.so.1").symlink_to(stub)
        places = [folder, *(str(lib) for p in packages for lib in sorted(p.glob("*/lib")))]
        environment = os.environ | found | {"LD_LIBRARY_PATH": ":".join(places + [os.environ.get("LD_LIBRARY_PATH", "")])}
        done = subprocess.run([program, "--test-case=*cuDNN has engines*,*vendors' own libraries*"], env=environment, capture_output=True, text=True, timeout=300)
    print(done.stdout, done.stderr)
    if done.returncode == 0 and ("not run" in done.stdout or " 2 passed" not in done.stdout):
        print("the two cases did not run")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
