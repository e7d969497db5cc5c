"""Keeps the include arrows of docs/architecture.md true, and the tree free of names that only one machine has."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAY_INCLUDE = {
    "libshard": {"libshard"},
    "formats": {"libshard", "formats"},
    "lm": {"libshard", "lm"},
    "ranks": {"libshard", "ranks"},
    "gpu": {"libshard", "lm", "ranks", "gpu"},
    "cli": {"libshard", "formats", "lm", "ranks", "gpu", "cli"},
    "samples": {"libshard", "formats", "lm"},
}
LIBSHARD_OUTSIDE = re.compile(r"<(fmt/|[a-z_0-9]+>|unistd\.h>)")
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def includes(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'\s*#\s*include\s+(["<][^">]+[">])', line)
        if found:
            yield number, found.group(1)


def main():
    bad = []
    for folder, allowed in MAY_INCLUDE.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in SOURCES:
                continue
            for number, name in includes(path):
                where = f"{path.relative_to(ROOT)}:{number}"
                if name.startswith('"') and name[1:-1].split("/")[0] not in allowed:
                    bad.append(f"{where}: {folder} may not include {name}")
                if folder == "libshard" and name.startswith("<") and not LIBSHARD_OUTSIDE.match(name):
                    bad.append(f"{where}: libshard knows the standard library and fmt only, not {name}")
                if name.startswith('"') and not (ROOT / name[1:-1]).exists():
                    bad.append(f"{where}: {name} does not start at the root")
            text = path.read_text()
            if folder != "cli" and re.search(r"\b(std::cout|std::cerr|fmt::print|printf|getenv|std::exit|abort)\s*\(", text):
                bad.append(f"{path.relative_to(ROOT)}: a library prints, exits or reads the environment")
            if not text.startswith("//"):
                bad.append(f"{path.relative_to(ROOT)}: the first line should say what the file is responsible for")
    print(*bad, sep="\n")
    print(f"{len(bad)} broken rules")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
