"""The pages of validate --html and serve in headless Chromium: they render whole, and need nothing from anywhere."""
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, run  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rendered(address, width=1000):
    """The document as the browser built it, and the hosts that it asked for. None but this machine is found."""
    with tempfile.TemporaryDirectory() as profile:
        log = pathlib.Path(profile) / "net.json"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run",
                   "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
                   f"--window-size={width},1400", f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        asked = set(re.findall(r'"url":"(?:https?|ftp|wss?)://([^"/]+)', log.read_text())) if log.exists() else set()
    return done.stdout, asked


def svgs(page):
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


class Pages(unittest.TestCase):
    def setUp(self):
        self.root = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)

    def look(self, page):
        pictures = svgs(page)
        for picture in pictures:
            for element in picture.iter():
                for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                    if name in element.attrib and not element.attrib[name].endswith("%"):
                        self.assertTrue(math.isfinite(float(element.attrib[name])), ElementTree.tostring(element))
                if element.tag.endswith("polyline"):
                    self.assertNotIn("nan", element.attrib["points"])
        self.assertNotRegex(page, r"(?i)<script|(?:src|href)=[\"']?(?:https?:)?//|@import|url\(")
        return pictures

    def validated(self, checkpoint, *args):
        page = self.root / "page.html"
        status = run("validate", checkpoint, "--html", page, "-q", *args)[0]
        dom, asked = rendered(page.as_uri())
        self.assertEqual(asked - self.own_hosts(), set())
        return status, dom

    def own_hosts(self):
        """What this browser asks for on its own, whatever the page."""
        blank = self.root / "blank.html"
        blank.write_text("<!DOCTYPE html><title>blank</title>")
        return rendered(blank.as_uri())[1]

    def test_a_sound_checkpoint_in_four_ranks(self):
        status, dom = self.validated(DATA / "legacy/llama_tied_bf16/tp2pp2")
        self.assertEqual(status, 0)
        pictures = self.look(dom)
        self.assertEqual(len(pictures), 5)  # layout, ties, three charts
        layout, ties, loss, activations, weights = pictures
        words = " ".join(layout.itertext())
        self.assertEqual([part in words for part in ("stage 0", "stage 1", "embedding", "layers 0–1", "layers 2–3", "output")], [True] * 6)
        self.assertIn("a copy of the same table", " ".join(ties.itertext()))
        for chart, points in ((loss, 32), (activations, 6), (weights, 4)):
            line = next(e for e in chart.iter() if e.tag.endswith("polyline"))
            self.assertEqual(len(line.attrib["points"].split()), points)
        self.assertIn(">sound<", dom)

    def test_mtp_virtual_stages_and_a_head_of_its_own(self):
        _, dom = self.validated(DATA / "hf/deepseek_v3_mtp_bf16")
        layout, ties = self.look(dom)[:2]
        self.assertIn("MTP × 1", " ".join(layout.itertext()))
        self.assertIn("MTP embedding", " ".join(ties.itertext()))
        self.assertIn("Not tied", dom)
        _, dom = self.validated(DATA / "legacy/llama_untied_bf16/tp2pp2vpp2")
        layout = self.look(dom)[0]
        self.assertEqual(len([e for e in layout.iter() if e.tag.endswith("rect")]), 4)

    def test_findings_and_hostile_names_stay_text(self):
        copy = self.root / "a<b>&\"c"
        shutil.copytree(DATA / "hf/gemma2_tied_bf16", copy)
        status, dom = self.validated(copy, "--max-loss", "0.1")
        self.assertEqual(status, 1)
        self.look(dom)
        self.assertIn("a&lt;b&gt;&amp;", dom)
        self.assertIn(">NOT sound<", dom)

    def test_the_page_of_serve(self):
        command = [SHARDKIT, "serve", "--listen", "127.0.0.1:0", "--history", str(self.root / "history.db"), "--root", str(DATA)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            try:
                line = server.stdout.readline() or server.stderr.readline()
                address = re.search(r"http://127\.0\.0\.1:\d+", line).group(0)
                for _ in range(2):
                    body = b'{"checkpoint": "hf/llama_untied_bf16"}'
                    urllib.request.urlopen(urllib.request.Request(f"{address}/validate", body), timeout=60).read()
                dom, asked = rendered(address + "/")
                self.look(dom)
                self.assertIn("llama_untied_bf16", dom)
                self.assertEqual(asked - self.own_hosts(), {address.removeprefix("http://")})
            finally:
                server.terminate()
                for _ in range(100):
                    if server.poll() is not None:
                        break
                    time.sleep(0.1)
                server.stdout.read(), server.stderr.read()


if __name__ == "__main__":
    if not CHROMIUM:
        print("skipped: no chromium here")
        sys.exit(77)
    unittest.main()
