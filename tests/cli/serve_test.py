"""The resident server: what it answers, whom it refuses, what its history keeps when clients, checkpoints and signals misbehave."""
import http.client
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import DATA, SHARDKIT, Case, run, run_json  # noqa: E402

LLAMA = "hf/llama_untied_bf16"
RUN = "legacy/llama_untied_bf16/tp1pp1"


def slow_tokens(path, rows):
    """About 5 ms of work a row on one core."""
    numbers = random.Random(1)
    path.write_text("\n".join(" ".join(str(numbers.randrange(200)) for _ in range(129)) for _ in range(rows)))


class Server:
    def __init__(self, *args, history, env=None, limit=None):
        command = [SHARDKIT, "serve", "--listen", "127.0.0.1:0", "--history", str(history), *map(str, args)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), (self.url, self.process.stderr.read())
        self.port = int(self.url.rsplit(":", 1)[1])

    def ask(self, method, path, body=None, headers=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read().decode(), dict(reply.getheaders())
        finally:
            connection.close()

    def json(self, method, path, body=None, **more):
        status, text, _ = self.ask(method, path, json.dumps(body) if body is not None else None, **more)
        return status, json.loads(text)

    def validate(self, **body):
        return self.json("POST", "/validate", body)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("did not come about in time")


class Serve(Case):
    def setUp(self):
        super().setUp()
        self.root = self.tmp / "root"
        self.root.mkdir()
        self.history = self.tmp / "state" / "history.sqlite"
        self.servers = []

    def tearDown(self):
        for server in self.servers:
            if server.process.poll() is None:
                server.process.kill()
            server.process.communicate()
        super().tearDown()

    def serve(self, *args, root=None, **more):
        server = Server("--root", root or self.root, *args, history=self.history, **more)
        self.servers.append(server)
        return server

    def put(self, name, to=None):
        shutil.copytree(DATA / name, self.root / (to or name))

    def stored(self):
        with sqlite3.connect(self.history) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchone(), ("ok",))
            db.row_factory = sqlite3.Row
            names = ["running", "sound", "bad", "error", "interrupted"]
            return [{**dict(row), "state": names[row["state"]]} for row in db.execute("SELECT * FROM validations ORDER BY id")]


class Answers(Serve):
    def test_health_and_pages(self):
        server = self.serve(root=DATA)
        self.assertEqual(server.json("GET", "/health")[1]["status"], "ok")
        self.assertEqual(server.ask("HEAD", "/health")[:2], (200, ""))
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:  # nothing of the first answer is left before the second
            s.sendall(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            first, second = b"".join(iter(lambda: s.recv(65536), b"")).split(b"\r\n\r\n", 1)
        self.assertIn(b"Content-Length: %d" % len(server.ask("GET", "/health")[1]), first)
        self.assertTrue(second.startswith(b"HTTP/1.1 404 "), second)
        self.assertEqual(server.json("GET", "/nothing")[1]["status"], 3)
        self.assertEqual(server.json("DELETE", "/")[0], 405)
        self.assertEqual(server.json("GET", "/validate")[0], 405)
        status, text, headers = server.ask("GET", "/")
        self.assertEqual(status, 200)
        self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
        self.assertNotIn("http", text.replace("http://www.w3.org", ""))

    def test_same_object_as_the_command(self):
        server = self.serve(root=DATA)
        reference = f"{LLAMA}/reference.safetensors"
        status, got = server.validate(checkpoint=LLAMA, reference=reference)
        self.assertEqual(status, 200)
        _, expected = run_json("validate", DATA / LLAMA, "--reference", DATA / reference)
        self.assertEqual(set(got), set(expected))
        for key in ("ok", "family", "layout", "tokens", "loss", "loss_true_vocab", "reference", "checks", "activations", "findings"):
            self.assertEqual(got[key], expected[key], key)
        again = server.validate(checkpoint=str((DATA / LLAMA).resolve()), compute="bf16", tp=2, pp=2, max_loss=0.1)
        self.assertEqual((again[0], again[1]["ok"]), (200, False))
        against = server.validate(checkpoint=RUN, against="legacy/llama_untied_bf16/tp2pp2", iteration=10)
        self.assertEqual(against[0], 200, against)

    def test_errors_have_statuses(self):
        server = self.serve(root=DATA)
        for body, http_status, status in (
            ({"checkpoint": "nothing"}, 404, 3),
            ({"checkpoint": "README.md"}, 422, 4),
            ({"checkpoint": LLAMA, "pp": 64}, 422, 5),
            ({"checkpoint": LLAMA, "tp": 0}, 400, 2),
            ({"checkpoint": LLAMA, "tp": "2"}, 400, 2),
            ({"checkpoint": LLAMA, "tp": 1e30}, 400, 2),
            ({"checkpoint": LLAMA, "compute": "f8"}, 400, 2),
            ({"checkpoint": LLAMA, "iteration": 1}, 400, 2),
            ({"checkpoint": ""}, 400, 2),
            ({"checkpoint": "a\0b"}, 400, 2),
            ({"checkpoint": "x" * 5000}, 404, 3),
            ({"checkpoint": LLAMA, "referense": "x"}, 400, 2),
            ({}, 400, 2),
        ):
            got = server.validate(**body)
            self.assertEqual((got[0], got[1]["status"]), (http_status, status), (body, got))
            self.assertEqual(len(got[1]["error"].splitlines()), 1)
        self.assertIn("referense", server.validate(checkpoint=LLAMA, referense="x")[1]["error"])

    def test_answers_speak_of_the_request(self):
        server = self.serve(root=DATA)
        self.assertEqual(server.validate(checkpoint=LLAMA, iteration=1)[1]["error"], f"{LLAMA}: is no Megatron run folder; iteration has no meaning")

    def test_metrics(self):
        server = self.serve(root=DATA)
        server.validate(checkpoint=LLAMA)
        server.validate(checkpoint="nothing")
        text = server.ask("GET", "/metrics")[1]
        for line in ('shardkit_requests_total{status="200"} 1', 'shardkit_requests_total{status="404"} 1', 'shardkit_validations_total{outcome="sound"} 1', "shardkit_queue_length 0",
                     f'shardkit_last_loss{{checkpoint="{LLAMA}"}} '):
            self.assertIn(line, text)

    def test_history_over_a_restart(self):
        name = "<script>&'\"x"
        self.put(LLAMA, name)
        server = self.serve()
        loss = server.validate(checkpoint=name)[1]["loss_true_vocab"]
        server.validate(checkpoint=name, max_loss=0.1)
        self.refused(2, "serve", "--root", self.root, "--history", self.history)  # held by the first
        self.assertEqual(server.end(), (0, ""))
        server = self.serve()
        _, rows = server.json("GET", "/history")
        self.assertEqual([(r["id"], r["state"], r["loss"]) for r in rows], [(2, "bad", loss), (1, "sound", loss)])
        self.assertEqual(server.json("GET", "/history/1")[1]["answer"]["loss_true_vocab"], loss)
        self.assertEqual(server.json("GET", "/history/77")[0], 404)
        page = server.ask("GET", "/")[1]
        self.assertNotIn("<script", page)
        self.assertIn("&lt;script&gt;", page)
        self.assertIn("<polyline", page)

    def test_a_disk_that_takes_no_rows(self):
        self.put(RUN, "run")
        (self.root / "run/iter_0000020").symlink_to(self.root / "run/iter_0000010")  # a link: not watched
        server = self.serve("--watch", self.root, "--every", 0.1)
        until(lambda: [row["state"] for row in server.json("GET", "/history")[1]] == ["sound"])
        limit = lambda size: resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # noqa: E731
        limit(1)
        status, answer = server.validate(checkpoint="run")
        self.assertEqual((status, answer["status"]), (500, 7))
        self.assertNotIn(str(self.history.parent), answer["error"])
        shutil.copytree(DATA / RUN / "iter_0000010", self.root / "run/iter_0000030")
        (self.root / "run/latest_checkpointed_iteration.txt").write_text("30")
        until(lambda: 'trouble_total{what="history"}' in server.ask("GET", "/metrics")[1])
        time.sleep(0.6)
        limit(resource.RLIM_INFINITY)
        until(lambda: [(row["checkpoint"], row["state"]) for row in server.json("GET", "/history")[1]] == [("run/iter_0000030", "sound"), ("run/iter_0000010", "sound")])
        self.assertEqual(server.end()[0], 0)

    def test_an_ending_that_the_disk_takes_later(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 300)
        server = self.serve("--threads", 1)
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.validate(checkpoint="good", tokens="slow.txt")))
        thread.start()
        until(lambda: [row["state"] for row in server.json("GET", "/history")[1]] == ["running"])
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        thread.join()
        self.assertEqual(replies[0][0], 200)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self.assertEqual(server.validate(checkpoint="good")[0], 200)
        self.assertEqual([row["state"] for row in server.json("GET", "/history")[1]], ["sound", "sound"])

    def test_foreign_files_are_no_history(self):
        self.history.parent.mkdir()
        self.history.write_text("not a database, " * 100)
        self.refused(4, "serve", "--root", self.root, "--history", self.history)
        for tables in ("CREATE TABLE validations(x)", "CREATE TABLE validations(id, state, status, error)", "CREATE TABLE other(x)"):
            self.history.unlink()
            with sqlite3.connect(self.history) as db:
                db.executescript(f"{tables}; PRAGMA user_version = 1")
            self.assertIn("no such", self.refused(4, "serve", "--root", self.root, "--history", self.history))

    def test_damaged_rows_are_shown_as_far_as_they_go(self):
        self.put(LLAMA, "good")
        server = self.serve()
        for _ in range(2):
            server.validate(checkpoint="good")
        server.end()
        with sqlite3.connect(self.history) as db:
            db.execute("UPDATE validations SET answer = substr(answer, 1, 100), started = 1e300 WHERE id = 1")
            db.execute("UPDATE validations SET started = -1e300, loss = 1e300, state = 77 WHERE id = 2")
        server = self.serve()
        status, row = server.json("GET", "/history/1")
        self.assertEqual((status, row["answer"], row["state"]), (200, None, "sound"))
        self.assertEqual(server.json("GET", "/history/2")[0], 200)
        self.assertEqual(server.ask("GET", "/")[0], 200)


class Doors(Serve):
    def test_root(self):
        self.put(LLAMA, "good")
        outside = self.tmp / "outside"
        shutil.copytree(DATA / LLAMA, outside)
        (self.root / "link").symlink_to(outside)
        (self.root / "inner").symlink_to(self.root / "good")
        (self.root / "loop").symlink_to(self.root / "loop")
        server = self.serve()
        self.assertEqual(server.validate(checkpoint="inner")[0], 200)
        self.assertEqual(server.validate(checkpoint=str(self.root / "good"))[0], 200)
        for path in ("..", "../outside", str(outside), "link", "link/config.json", "good/../../outside", "/etc/passwd", "/", "nothing/../../outside", "/no/such", f"{self.root}x"):
            self.assertEqual(server.validate(checkpoint=path)[0], 403, path)
            for key in ("reference", "tokens", "against"):
                self.assertEqual(server.validate(checkpoint="good", **{key: path})[0], 403, (key, path))
        self.assertEqual(server.validate(checkpoint="loop")[0], 404)

    def test_snapshots_of_a_cache(self):
        model = self.tmp / "models--x--y"
        shutil.copytree(DATA / LLAMA, model / "blobs")
        snapshot = model / "snapshots/1"
        snapshot.mkdir(parents=True)
        for file in (model / "blobs").iterdir():
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        self.put(LLAMA, "good")
        server = self.serve(root=model)
        self.assertEqual(server.validate(checkpoint="snapshots/1")[0], 200)
        server.end()
        shutil.copytree(DATA / LLAMA, model / "snapshots/good")
        server = self.serve(root=model / "snapshots")  # the blobs lie outside
        for answer in (server.validate(checkpoint="1"), server.validate(checkpoint="good", against="1")):
            self.assertEqual((answer[0], "blobs are outside the root" in answer[1]["error"]), (403, True))

    def test_token(self):
        self.refused(2, "serve", "--listen", "0.0.0.0:0", "--root", self.root, "--history", self.history)
        self.refused(2, "serve", "--listen", "example.org:80", "--root", self.root, "--history", self.history)
        server = self.serve(root=DATA, env={"SHARDKIT_TOKEN": "secret"})
        self.assertEqual(server.json("GET", "/health")[0], 200)
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Bearer secret2"}, {"Authorization": "secret"}, {"Authorization": "Bearer "}):
            for method, path in (("GET", "/"), ("GET", "/metrics"), ("GET", "/history"), ("POST", "/validate")):
                self.assertEqual(server.json(method, path, {"checkpoint": LLAMA} if method == "POST" else None, headers=wrong)[0], 401, (wrong, path))
        self.assertEqual(server.json("GET", "/history", headers={"Authorization": "bearer secret"})[0], 200)
        self.assertEqual(server.json("GET", "/history", headers={"Authorization": "Bearer SECRET"})[0], 401)
        right = {"Authorization": "Bearer secret"}
        self.assertEqual(server.json("POST", "/validate", {"checkpoint": LLAMA}, headers=right)[0], 200)
        self.assertEqual(server.ask("GET", "/", headers=right)[0], 200)

    def test_pages_of_other_sites(self):
        server = self.serve(root=DATA)
        for name in ("evil.example", "127.evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1].evil.example"):
            for host in (name, f"{name}:{server.port}"):
                self.assertEqual(server.json("GET", "/history", headers={"Host": host})[0], 403, host)
        for host in ("127.0.0.1", f"127.0.0.1:{server.port}", "127.1.2.3", "127.1", "LOCALHOST", "Localhost:1", "localhost", "localhost:1", "[::1]", "[::1]:1"):
            self.assertEqual(server.json("GET", "/history", headers={"Host": host})[0], 200, host)
        self.assertEqual(server.json("POST", "/validate", {"checkpoint": LLAMA}, headers={"Origin": "http://evil.example"})[0], 403)
        self.assertIn("'box.local' is no local name", server.json("GET", "/history", headers={"Host": "box.local"})[1]["error"])


class Abuse(Serve):
    def raw(self, server, data, read=True):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
            try:
                s.sendall(data)
                return s.recv(65536) if read else b""
            except ConnectionError:
                return b""

    def test_a_thousand_bad_requests(self):
        self.put(LLAMA, "good")
        server = self.serve("--queue", 4)
        post = lambda body: b"POST /validate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body  # noqa: E731
        bodies = [b"", b"{", b"null", b"[]", b'"x"', b"{}" * 3, b"[" * 5000, b'{"checkpoint":' * 600, b'{"checkpoint":"good","checkpoint":"good"}', b"\xff\xfe{}", b'{"checkpoint":"\xff"}',
                  b'{"checkpoint":"good"}\0', b'{"checkpoint":1e999}', b'{"checkpoint":"../../etc/passwd"}', b'{"checkpoint":{"a":[1,2,3]}}', b'{"max_loss":NaN,"checkpoint":"good"}',
                  b'{"checkpoint":"good","tp":-1}', b'{"checkpoint":"good/config.json"}', b'{"checkpoint":"good","tokens":"good/config.json"}', b"{" + b'"a":1,' * 20000 + b'"b":1}']
        rude = [b"\r\n\r\n", b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00" * 20, b"POST /validate HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"POST /validate HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                b"POST /validate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", b"GET /" + b"a" * 30000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 6000 + b"\r\n",
                b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /history/-1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"PUT /validate HTTP/1.1\r\nHost: localhost\r\n\r\n"]
        seen, trouble, lock = {}, [], threading.Lock()

        def client(seed):
            numbers = random.Random(seed)
            for _ in range(125):
                kind = numbers.randrange(4)
                try:
                    if kind == 0:
                        reply = self.raw(server, post(numbers.choice(bodies)))
                    elif kind == 1:
                        reply = self.raw(server, numbers.choice(rude), read=False)
                    elif kind == 2:  # hangs up in the middle of the request, or before the answer
                        whole = post(b'{"checkpoint":"good"}')
                        reply = self.raw(server, whole[: numbers.randrange(1, len(whole) + 1)], read=False)
                    else:
                        reply = self.raw(server, post(b'{"checkpoint":"good"}'))
                    status = int(reply.split()[1]) if reply.startswith(b"HTTP/") else None
                    with lock:
                        seen[status] = seen.get(status, 0) + 1
                except Exception as error:  # noqa: BLE001
                    with lock:
                        trouble.append(repr(error))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(trouble, [])
        self.assertLessEqual(set(seen) - {None}, {200, 400, 403, 404, 413, 422, 503}, seen)
        self.assertGreater(seen[400], 100, seen)
        self.assertGreater(seen[200], 20, seen)
        until(lambda: server.json("GET", "/health")[1]["queued"] == 0)
        self.assertEqual(server.validate(checkpoint="good")[0], 200)
        descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        self.assertLess(descriptors, 60)
        self.assertEqual(server.end(), (0, ""))
        rows = self.stored()
        self.assertGreaterEqual(sum(row["state"] == "sound" for row in rows), seen[200])
        self.assertNotIn("running", {row["state"] for row in rows})

    def test_silent_clients_hold_nobody_up(self):
        server = self.serve(root=DATA)
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
        silent[0].sendall(b"POST /validate HTTP/1.1\r\nContent-Le")
        start = time.monotonic()
        self.assertEqual(server.validate(checkpoint=LLAMA)[0], 200)
        self.assertLess(time.monotonic() - start, 5)
        for one in silent:
            one.close()

    def test_full_line(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 300)
        server = self.serve("--queue", 1, "--threads", 1)
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(server.ask("POST", "/validate", json.dumps({"checkpoint": "good", "tokens": "slow.txt"})))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(reply[0] for reply in replies)
        self.assertIn(503, statuses)
        self.assertIn(200, statuses)
        self.assertTrue(all("Retry-After" in reply[2] for reply in replies if reply[0] == 503))

    def test_timeout_and_clients_that_leave(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 1200)
        server = self.serve("--timeout", 0.3, "--threads", 1)
        status, answer = server.validate(checkpoint="good", tokens="slow.txt")
        self.assertEqual((status, answer["status"]), (504, 7))
        server.end()
        server = self.serve("--threads", 1)
        body = b'{"checkpoint":"good","tokens":"slow.txt"}'
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(b"POST /validate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: server.json("GET", "/health")[1]["running"])
        until(lambda: not server.json("GET", "/health")[1]["running"])
        self.assertEqual(server.end()[0], 0)
        self.assertEqual([(row["state"], row["error"]) for row in self.stored()],
                         [("interrupted", "the time for this request is over"), ("interrupted", "the client went away")])

    def test_who_leaves_the_line_makes_room(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 1500)
        server = self.serve("--queue", 1, "--threads", 1, "--timeout", 30)
        body = json.dumps({"checkpoint": "good", "tokens": "slow.txt"}).encode()
        request = b"POST /validate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection(("127.0.0.1", server.port)) as running:
            running.sendall(request)
            until(lambda: server.json("GET", "/health")[1]["running"])
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as waiting:
                    waiting.sendall(request)
                    until(lambda: server.json("GET", "/health")[1]["queued"] == 1)
                until(lambda: server.json("GET", "/health")[1]["queued"] == 0)
            self.assertTrue(server.json("GET", "/health")[1]["running"])

    def test_time_is_over_in_the_line(self):
        self.put(RUN, "run")
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 2500)
        server = self.serve("--watch", self.root / "run", "--every", 0.1, "--tokens", self.root / "slow.txt", "--timeout", 0.5, "--threads", 1)
        until(lambda: server.json("GET", "/health")[1]["running"])
        self.assertEqual(server.validate(checkpoint="good")[0], 504)
        self.assertTrue(server.json("GET", "/health")[1]["running"])

    def test_checkpoint_is_written_to(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 300)
        server = self.serve("--threads", 1)
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.validate(checkpoint="good", tokens="slow.txt")))
        thread.start()
        until(lambda: server.json("GET", "/health")[1]["running"])
        weights = self.root / "good/model-00002-of-00004.safetensors"
        content = weights.read_bytes()
        while thread.is_alive():  # at first it may not have been opened yet
            with open(weights, "r+b") as file:
                file.write(content)
            time.sleep(0.05)
        self.assertEqual(replies[0][0], 500, replies)
        self.assertIn("model-00002-of-00004.safetensors", replies[0][1]["error"])

    def test_checkpoint_vanishes(self):
        self.put(LLAMA, "good")
        server = self.serve()
        outcomes = set()
        for attempt in range(25):
            self.put(LLAMA, "going")
            thread = threading.Timer(attempt * 0.0003, shutil.rmtree, (self.root / "going",), {"ignore_errors": True})
            thread.start()
            status, answer = server.validate(checkpoint="going")
            thread.join()
            outcomes.add(status)
            if status != 200:
                self.assertIn("error", answer)
            shutil.rmtree(self.root / "going", ignore_errors=True)
        self.assertLessEqual(outcomes, {200, 404, 422, 500})
        self.assertEqual(server.validate(checkpoint="good")[0], 200)


class Ends(Serve):
    def test_sigterm_in_flight(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 2000)
        server = self.serve("--threads", 1)
        server.validate(checkpoint="good")
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(server.validate(checkpoint="good", tokens="slow.txt"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: server.json("GET", "/health")[1]["queued"] == 2)
        start = time.monotonic()
        self.assertEqual(server.end(), (0, ""))
        self.assertLess(time.monotonic() - start, 10)
        for thread in threads:
            thread.join()
        self.assertEqual([reply[0] for reply in replies], [503] * 3)
        self.assertEqual([row["state"] for row in self.stored()], ["sound", "interrupted"])
        self.assertEqual(len(self.serve().json("GET", "/history")[1]), 2)

    def test_kill_in_flight(self):
        self.put(LLAMA, "good")
        slow_tokens(self.root / "slow.txt", 1000)
        server = self.serve("--threads", 1)
        server.validate(checkpoint="good")
        body = json.dumps({"checkpoint": "good", "tokens": "slow.txt"})
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/validate", body)
        until(lambda: server.json("GET", "/health")[1]["running"])
        time.sleep(0.1)
        server.process.kill()
        server.process.wait()
        connection.close()
        _, rows = self.serve().json("GET", "/history")
        self.assertEqual([row["state"] for row in rows], ["interrupted", "sound"])

    def test_sigint(self):
        self.assertEqual(self.serve().end(signal.SIGINT)[0], 130)


class Watching(Serve):
    def states(self):
        return [(row["checkpoint"], row["state"]) for row in self.stored()]

    def test_iterations_once_the_tracker_is_there(self):
        server = self.serve("--watch", self.root, "--every", 0.1)
        shutil.copytree(DATA / RUN / "iter_0000010", self.root / "run/iter_0000010")
        time.sleep(1.2)
        self.assertEqual(server.json("GET", "/history")[1], [])
        shutil.copytree(DATA / RUN / "iter_0000010", self.root / "run/iter_0000020")
        tracker = self.root / "run/latest_checkpointed_iteration.txt"
        tracker.write_text("10")
        until(lambda: len(server.json("GET", "/history")[1]) == 1 and server.json("GET", "/history")[1][0]["state"] == "sound")
        time.sleep(0.6)
        self.assertEqual(self.states(), [("run/iter_0000010", "sound")])
        tracker.write_text("20")
        until(lambda: len(server.json("GET", "/history")[1]) == 2 and server.json("GET", "/history")[1][0]["state"] == "sound")
        server.end()
        server = self.serve("--watch", self.root, "--every", 0.1)
        time.sleep(1)
        self.assertEqual(self.states(), [("run/iter_0000010", "sound"), ("run/iter_0000020", "sound")])
        self.assertIn("<polyline", server.ask("GET", "/")[1])

    def test_other_folders_once_they_are_quiet_and_open(self):
        server = self.serve("--watch", self.root, "--every", 0.1)
        target = self.root / "llama"
        target.mkdir()
        for file in sorted((DATA / LLAMA).iterdir()):
            time.sleep(0.15)
            shutil.copy(file, target)
        until(lambda: any(row["state"] == "sound" for row in server.json("GET", "/history")[1]))
        time.sleep(0.6)
        self.assertEqual(self.states(), [("llama", "sound")])

    def test_names_of_any_bytes(self):
        for name in (b"caf\xe9", b"new\nline", b'quo"te\\'):
            shutil.copytree(os.fsencode(DATA / LLAMA), os.path.join(os.fsencode(self.root), name))
        server = self.serve("--watch", self.root, "--every", 0.1)
        until(lambda: len(server.json("GET", "/history")[1]) == 3)
        until(lambda: not server.json("GET", "/health")[1]["running"])
        text = server.ask("GET", "/metrics")[1]  # UTF-8, or Prometheus refuses all of it
        for label in ("caf?", "new\\nline", 'quo\\"te\\\\'):
            self.assertIn(f'shardkit_last_loss{{checkpoint="{label}"}} ', text)
        self.assertIn("caf?", server.ask("GET", "/")[1])

    def test_no_file_for_a_tracker(self):
        self.put(RUN, "run")
        (self.root / "odd").mkdir()
        os.mkfifo(self.root / "odd/latest_checkpointed_iteration.txt")
        (self.root / "run/iter_0000010").rename(self.root / "odd/iter_0000010")
        server = self.serve("--watch", self.root, "--every", 0.1)
        time.sleep(0.6)
        self.assertEqual(server.json("GET", "/history")[1], [])
        self.assertEqual(server.end(), (0, ""))

    def test_command_on_a_bad_verdict(self):
        name = "$(touch pwned);`touch pwned`"
        out = self.tmp / "out"
        command = f'printf "%s|%s|%s\\n" "$SHARDKIT_VERDICT" "$SHARDKIT_CHECKPOINT" "$SHARDKIT_TOKEN" >{out}.new; cat >>{out}.new; mv {out}.new {out}'
        shutil.copytree(DATA / RUN, self.root / name)
        server = self.serve("--watch", self.root, "--every", 0.1, "--max-loss", 0.1, "--on-bad", command, env={"SHARDKIT_TOKEN": "secret"})
        until(out.exists)
        first, rest = out.read_text().split("\n", 1)
        self.assertEqual(first, f"bad|{name}/iter_0000010|")
        record = json.loads(rest)
        self.assertEqual((record["checkpoint"], record["answer"]["ok"]), (f"{name}/iter_0000010", False))
        self.assertLess(abs(record["started"] - time.time()), 100)
        self.assertFalse((self.root / "pwned").exists())
        server.end()

    def test_command_that_the_end_cuts_short(self):
        self.put(RUN, "run")
        started = self.tmp / "started"
        server = self.serve("--watch", self.root, "--every", 0.1, "--max-loss", 0.1, "--on-bad", f"touch {started}; sleep 50")
        until(started.exists)
        status, said = server.end()
        self.assertEqual(status, 0)
        self.assertIn("--on-bad: the command was killed: the server stops", said)

    def test_what_could_judge_nothing_is_refused_at_the_start(self):
        tokens, reference = self.tmp / "tokens.txt", DATA / LLAMA / "reference.safetensors"
        tokens.write_text("1 2 3")
        for status, args in ((2, ("--compute", "f64")), (2, ("--tp", 0)), (2, ("--pp", -1)), (2, ("--max-loss", "nan")), (2, ("--max-loss", "inf")), (2, ("--tokens", tokens, "--reference", reference)),
                             (4, ("--reference", tokens)), (4, ("--reference", next((DATA / LLAMA).glob("model*.safetensors")))), (3, ("--text", self.tmp / "none")), (4, ("--tokens", DATA / LLAMA / "config.json"))):
            self.refused(status, "serve", "--watch", self.root, "--history", self.history, *args, timeout=20)

    def test_what_only_watching_needs(self):
        for args in (("--every", 1), ("--tokens", "x"), ("--text", "x"), ("--reference", "x"), ("--max-loss", 1), ("--compute", "bf16"), ("--tp", 2), ("--pp", 2)):
            said = self.refused(2, "serve", "--root", self.root, "--history", self.history, *args, timeout=20)
            self.assertIn(f"{args[0]} requires --watch", said)

    def test_broken_iteration_is_an_error_once(self):
        out = self.tmp / "out"
        shutil.copytree(DATA / RUN, self.root / "run")
        weights = next((self.root / "run").rglob("model_optim_rng.pt"))
        weights.write_bytes(weights.read_bytes()[:5000])
        server = self.serve("--watch", self.root, "--every", 0.1, "--on-bad", f'echo "$SHARDKIT_VERDICT $SHARDKIT_STATUS" >>{out}', "-q")
        until(out.exists)
        time.sleep(0.6)
        self.assertEqual(server.end(), (0, ""))
        self.assertEqual(out.read_text(), "error 4\n")
        self.assertEqual(self.states(), [("run/iter_0000010", "error")])


if __name__ == "__main__":
    unittest.main(verbosity=2 if "-v" in sys.argv else 1)
