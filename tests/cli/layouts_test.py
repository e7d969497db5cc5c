"""Every bundled layout of a family to every other, over both formats: one digest, and A -> B -> A gives A's bytes."""
import pathlib
import re
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, Case, digest, files_below, run, run_json  # noqa: E402


def flags(name):
    t, p, v = re.match(r"tp(\d+)pp(\d+)(?:vpp(\d+))?", name).groups()
    return ["--tp", t, "--pp", p, "--vpp", v or "1"]


def families():
    for kind in ("legacy", "mcore"):
        for family in sorted((DATA / kind).iterdir()):
            layouts = sorted(x for x in family.iterdir() if x.name.startswith("tp"))
            if layouts:
                yield kind, family.name, layouts


class Layouts(Case):
    def test_one_digest(self):
        for kind, family, layouts in families():
            with self.subTest(family=f"{kind}/{family}"):
                self.assertEqual(len({digest(x) for x in layouts}), 1)

    def test_there_and_back(self):
        grids = (["--tp", 1, "--pp", 1, "--vpp", 1], ["--tp", 2, "--pp", 4, "--vpp", 1], ["--tp", 8, "--pp", 2, "--vpp", 2], ["--tp", 4, "--pp", 1, "--vpp", 1],
                 ["--tp", 1, "--pp-layout", "Et|tt|t|L", "--pp", 4], ["--tp", 2, "--pp", 2, "--first-stage-layers", 1, "--vpp", 1])
        for kind, family, layouts in families():
            source = layouts[-1]
            for number, grid in enumerate(grids):
                for to in ("mp_rank", "torch_dist"):
                    with self.subTest(family=f"{kind}/{family}", grid=grid, to=to):
                        there, back = self.tmp / f"{kind}{family}{number}{to}", self.tmp / f"{kind}{family}{number}{to}back"
                        self.ok("convert", source, there, "--to", to, *grid, "-q", "--no-sync")
                        self.assertEqual(digest(there), digest(source))
                        status, out = run_json("verify", there)
                        self.assertEqual(status, 0, out)
                        self.ok("convert", there, back, "--to", "mp_rank" if kind == "legacy" else "torch_dist", *flags(source.name), "-q", "--no-sync")
                        status, out, _ = run("diff", source, back)
                        self.assertEqual(status, 0, out)

    def test_same_layout_again_is_the_same_file(self):
        source = DATA / "legacy/llama_untied_bf16/tp2pp2"
        self.ok("reshard", source, self.tmp / "a", "--tp", 4, "--pp", 1)
        self.ok("reshard", self.tmp / "a", self.tmp / "b", "--tp", 2, "--pp", 2)
        self.ok("reshard", self.tmp / "b", self.tmp / "c", "--tp", 4, "--pp", 1)
        self.assertEqual(files_below(self.tmp / "a"), files_below(self.tmp / "c"))


if __name__ == "__main__":
    unittest.main()
