"""Every status that `/openapi.json` documents is met on the real server, and no other."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import MODELS, Server, command

READ, ADMIN = "the-read-key", "the-admin-key"
ANALYTIC = {"synthesizer": "analytic", "gate": {"enabled": False}, "unlabelled_negatives": "trust"}
SHORT = {"recipe": ANALYTIC, "delivery": {"count": 1, "batch_size": 1}}
# A training of two steps, and one that does not end.
TRAINING = {
    "widths": [4, 8], "steps": 2, "batch_size": 1, "split": {"folds": 2},
    "recipe": {**ANALYTIC, "patch": [32, 32, 32]},
    "held_out": {"cases": 1, "window": {"window": [32, 32, 32], "overlap": 0.0}},
}
ENDLESS = {**TRAINING, "steps": 1 << 40}
# What a request alone cannot bring about: a panic, a lost device, a default recipe of other models.
UNPROVOKED = {
    ("/livez", "503"), ("/v1/stream", "500"), ("/v1/recipes/validate", "500"), ("/v1/batch", "409"), ("/v1/batch", "400"),
    ("/v1/models/{name}/load", "500"),
    *((f"/v1/models/{path}", status) for path in ("{name}/activate", "{name}/release", "roll-back")
      for status in ("422", "500")),
    *((f"/v1/trainings{path}", "500") for path in (
        "", "/{name}", "/{name}/events", "/{name}/files/{file}", "/{name}/stop", "/{name}/resume",
        "/{name}/promote/{models}")),
    ("/v1/models/{name}/activate", "409"), ("/v1/models/roll-back", "404"), ("/v1/models/{name}/load", "409"),
}


class Caller:
    """Asks a server, and keeps which statuses each documented route answered with."""

    def __init__(self, document: dict) -> None:
        self.document, self.met = document, set()

    def ask(
        self, server: Server, method: str, path: str, body: object = None, *, route: str | None = None,
        key: str | None = READ, host: str | None = None,
    ) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if host:
            headers["Host"] = host
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return self.keep(route or path.split("?")[0], method, answer.status, dict(answer.headers), text)

    def keep(self, route: str, method: str, status: int, headers: dict[str, str], text: bytes) -> int:
        documented = self.document["paths"][route][method.lower()]["responses"]
        assert str(status) in documented, f"{method} {route} answered {status}, which is not documented: {text[:500]!r}"
        assert headers.get("x-request-id"), headers
        if status >= 400:
            problem = json.loads(text)
            assert headers["content-type"] == "application/problem+json" and problem["status"] == status
            assert problem["request_id"] == headers["x-request-id"]
            assert ("retry-after" in headers) == (status in (429, 503)), headers
        self.met.add((route, str(status)))
        return status


@pytest.fixture(scope="module")
def served(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    for name in ("first", "damaged"):
        shutil.copytree(MODELS, root / name)
    (root / "damaged" / "generator.safetensors").write_bytes(b"")
    settings = {
        "READ_KEYS": READ, "ADMIN_KEYS": ADMIN, "BODY_SECONDS": "1", "MAX_STREAMS": "1", "MAX_BATCH_REQUESTS": "1",
        "DRAIN_SECONDS": "30",
    }
    settings = {f"FREETUMOR__SERVER__{name}": value for name, value in settings.items()}
    settings |= {"FREETUMOR__JOBS__MAX_QUEUED": "1", "FREETUMOR__JOBS__MAX_FOLLOWERS": "1"}
    jobs = tmp_path_factory.mktemp("jobs")
    arguments = ("--models-root", root, "--jobs-dir", jobs)
    with Server(store, *arguments, env=settings, models=root / "first") as running:
        yield running


def routes(document: dict) -> Iterator[tuple[str, str, dict]]:
    for route, methods in document["paths"].items():
        for method, described in methods.items():
            yield route, method.upper(), described["responses"]


def raw(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes that are no whole request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, headers, answer.read()


def busy_stream(server: Server) -> socket.socket:
    """Opens a stream and reads no more of it than that it was opened."""
    body = json.dumps({"recipe": {**ANALYTIC, "patches_per_epoch": 1 << 30}, "delivery": {"batch_size": 16}}).encode()
    head = f"POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {READ}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(head.encode() + body)
    assert b" 200 " in connection.recv(64)
    return connection


def everybody(caller: Caller, server: Server) -> None:
    """What does not depend on the route: keys, hosts, plain success."""
    for route, method, responses in routes(caller.document):
        path = re.sub("{.*?}", "nothing", route)
        if "421" in responses:
            # Not with a key: who brings one is no web page that does not know our name.
            assert caller.ask(server, method, path, route=route, key=None, host="evil.example") == 421
        if "401" in responses:
            assert caller.ask(server, method, path, route=route, key=None) == 401
        if "403" in responses:
            assert caller.ask(server, method, path, route=route, key=READ) == 403
        if method == "GET" and "{" not in route:
            assert caller.ask(server, method, path) == 200, path
    assert caller.ask(server, "POST", "/v1/reload", key=ADMIN) == 204


def streams_and_batches(caller: Caller, server: Server) -> None:
    for path in ("/v1/stream", "/v1/recipes/validate"):
        assert caller.ask(server, "POST", path, SHORT) == 200
        assert caller.ask(server, "POST", path, b"{") == 400
        assert caller.ask(server, "POST", path, b" " * (2 << 20)) == 413
        assert caller.ask(server, "POST", path, {"recipe": {"sed": 1}}) == 422
        begun = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {READ}\r\nContent-Length: 9\r\n\r\n{{"
        assert caller.keep(path, "POST", *raw(server, begun.encode())) == 408
    assert caller.ask(server, "GET", "/v1/batch?size=huge") == 422
    cursor = {"recipe": "0" * 64, "snapshot": "0" * 64, "bundle": "0" * 64, "revision": 1, "next_index": 0}
    for path in ("/v1/stream", "/v1/recipes/validate"):
        asked = {"recipe": ANALYTIC, "delivery": {"cursor": cursor}}
        assert caller.ask(server, "POST", path, asked) == 409
        asked["delivery"]["cursor"] = {**cursor, "bundle": "a" * 64}
        assert caller.ask(server, "POST", path, asked) == 410
        asked = {"recipe": {**ANALYTIC, "bundle": "a" * 64}}
        assert caller.ask(server, "POST", path, asked) == 422


def crowds(caller: Caller, server: Server) -> None:
    with busy_stream(server):
        assert caller.ask(server, "POST", "/v1/stream", SHORT) == 429
    batch = "/v1/batch?batch_size=32&patch=96&synthesizer=analytic&gate=off&unlabelled_negatives=trust"
    long = threading.Thread(target=caller.ask, args=(server, "GET", batch))
    long.start()
    time.sleep(0.1)
    while long.is_alive() and ("/v1/recipes/validate", "429") not in caller.met:
        caller.ask(server, "POST", "/v1/recipes/validate", SHORT)
    assert caller.ask(server, "GET", batch) == 429
    long.join()


def models(caller: Caller, server: Server) -> None:
    def change(path: str, route: str) -> int:
        return caller.ask(server, "POST", f"/v1/models/{path}", route=f"/v1/models/{route}", key=ADMIN)

    assert change("first/load", "{name}/load") == 200
    assert change("damaged/load", "{name}/load") == 422
    for verb in ("load", "activate", "release"):
        assert change(f"nothing/{verb}", f"{{name}}/{verb}") == 404
    assert change("first/activate", "{name}/activate") == 200
    assert change("first/release", "{name}/release") == 409
    assert change("roll-back", "roll-back") == 409


FILE = "/v1/trainings/{name}/files/{file}"


def trainings(caller: Caller, server: Server) -> None:
    """One training that ends, one that does not, and one that waits behind it."""

    def submit(name: str, segmentor: dict, key: str = ADMIN) -> int:
        return caller.ask(server, "POST", "/v1/trainings", {"name": name, "segmentor": segmentor}, key=key)

    def change(path: str, route: str) -> int:
        return caller.ask(server, "POST", f"/v1/trainings/{path}", route=f"/v1/trainings/{{name}}/{route}", key=ADMIN)

    def state(name: str) -> str:
        return json.loads(server.get(f"/v1/trainings/{name}", key=READ)[1])["state"]

    def until(name: str, wanted: str) -> None:
        deadline = time.monotonic() + 120
        while state(name) != wanted:
            assert time.monotonic() < deadline, server.get(f"/v1/trainings/{name}", key=READ)
            time.sleep(0.05)

    path = "/v1/trainings"
    assert caller.ask(server, "POST", path, b"{", key=ADMIN) == 400
    assert caller.ask(server, "POST", path, b" " * (2 << 20), key=ADMIN) == 413
    begun = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {ADMIN}\r\nContent-Length: 9\r\n\r\n{{"
    assert caller.keep(path, "POST", *raw(server, begun.encode())) == 408
    assert submit("short", {**TRAINING, "step": 1}) == 422
    assert submit("short", TRAINING) == 201
    assert submit("short", TRAINING) == 409
    until("short", "finished")
    assert caller.ask(server, "GET", f"{path}/short", route=f"{path}/{{name}}") == 200
    assert caller.ask(server, "GET", f"{path}/short/events", route=f"{path}/{{name}}/events") == 200
    assert caller.ask(server, "GET", f"{path}/short/events?after=x", route=f"{path}/{{name}}/events") == 400
    assert caller.ask(server, "GET", f"{path}/short/files/segmentor.json", route=FILE) == 200
    for known in ("", "/events", "/files/{file}"):
        asked = f"{path}/nothing{known}".replace("{file}", "segmentor.json")
        assert caller.ask(server, "GET", asked, route=f"{path}/{{name}}{known}") == 404
    for verb in ("stop", "resume"):
        assert change(f"nothing/{verb}", verb) == 404
        assert change(f"short/{verb}", verb) == 409
    promote = "promote/{models}"
    assert change("short/promote/promoted", promote) == 201
    assert change("short/promote/promoted", promote) == 409
    assert change("short/promote/no..name", promote) == 422
    assert change("nothing/promote/promoted", promote) == 404

    assert submit("endless", ENDLESS) == 201
    until("endless", "running")
    assert submit("waiting", TRAINING) == 201
    assert submit("third", TRAINING) == 429
    following = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    following.request("GET", f"{path}/endless/events", headers={"X-API-Key": READ})
    assert following.getresponse().status == 200
    assert caller.ask(server, "GET", f"{path}/endless/events", route=f"{path}/{{name}}/events") == 429
    assert caller.ask(server, "GET", f"{path}/short/files/segmentor.json", route=FILE) == 429
    following.close()
    assert change("waiting/stop", "stop") == 202
    assert submit("third", TRAINING) == 201
    assert change("waiting/resume", "resume") == 429
    assert change("third/stop", "stop") == 202
    assert change("waiting/resume", "resume") == 202
    assert change("waiting/stop", "stop") == 202
    for name, status in (("third", 204), ("third", 404), ("endless", 409)):
        assert caller.ask(server, "DELETE", f"{path}/{name}", route=f"{path}/{{name}}", key=ADMIN) == status


def drained(caller: Caller, server: Server) -> None:
    with busy_stream(server) as stream:
        # A stream that has no batch yet ends at once, and the server with it: wait for a part of the first, which is many times larger.
        taken = 0
        while taken < 1 << 16:
            taken += len(stream.recv(1 << 16))
        assert caller.ask(server, "POST", "/v1/drain", key=ADMIN) == 202
        assert caller.ask(server, "GET", "/readyz") == 503
        assert caller.ask(server, "GET", "/livez") == 200
        assert caller.ask(server, "GET", "/v1/batch") == 503
        for path in ("/v1/stream", "/v1/recipes/validate"):
            assert caller.ask(server, "POST", path, SHORT) == 503
        training = {"name": "late", "segmentor": TRAINING}
        assert caller.ask(server, "POST", "/v1/trainings", training, key=ADMIN) == 503
        resume = "/v1/trainings/{name}/resume"
        assert caller.ask(server, "POST", "/v1/trainings/waiting/resume", route=resume, key=ADMIN) == 503


def test_every_documented_status_is_met_and_no_other(served: Server, store: Path, tmp_path: Path) -> None:
    caller = Caller(json.loads(served.get("/openapi.json")[1]))
    everybody(caller, served)
    streams_and_batches(caller, served)
    trainings(caller, served)
    crowds(caller, served)
    models(caller, served)
    elsewhere(caller, store, tmp_path)
    drained(caller, served)
    documented = {(route, status) for route, _, responses in routes(caller.document) for status in responses}
    missed = documented - caller.met - UNPROVOKED
    assert not missed, sorted(missed)


def elsewhere(caller: Caller, store: Path, tmp_path: Path) -> None:
    """What needs a server of its own: no admin keys, keys that cannot be read, damage, models that saw the cases."""
    with Server(store) as running:
        for path in ("/v1/reload", "/v1/drain", "/v1/models/roll-back", "/v1/trainings"):
            assert caller.ask(running, "POST", path) == 404
        release = "/v1/models/{name}/release"
        assert caller.ask(running, "POST", "/v1/models/x/release", route=release) == 404
        for route in [path for path in caller.document["paths"] if path.startswith("/v1/trainings")]:
            if "get" in caller.document["paths"][route]:
                assert caller.ask(running, "GET", re.sub("{.*?}", "x", route), route=route) == 409
    keys = tmp_path / "keys"
    keys.write_text(READ)
    settings = {"FREETUMOR__SERVER__ADMIN_KEYS": ADMIN, "FREETUMOR__SERVER__READ_KEYS_FILE": str(keys)}
    root = tmp_path / "models"
    for name in ("first", "second"):
        shutil.copytree(MODELS, root / name)
    manifest = json.loads((root / "second" / "critic.json").read_text())
    manifest["training"]["steps"] += 1
    (root / "second" / "critic.json").write_text(json.dumps(manifest))
    with Server(store, "--models-root", root, env=settings, models=root / "first") as running:
        # Trainings are admins' business, and this server hosts none.
        for verb in ("stop", "resume", "promote/{models}"):
            route = f"/v1/trainings/{{name}}/{verb}"
            assert caller.ask(running, "POST", re.sub("{.*?}", "x", route), route=route, key=ADMIN) == 409
        keys.write_text("")
        assert caller.ask(running, "POST", "/v1/reload", key=ADMIN) == 500
        for path in ("second/load", "second/activate", "roll-back", "second/release"):
            route = path.replace("second", "{name}")
            status = caller.ask(running, "POST", f"/v1/models/{path}", route=f"/v1/models/{route}", key=ADMIN)
            assert status in (200, 204), path
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    for case in (damaged / "cases").iterdir():
        content = bytearray(case.read_bytes())
        content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
        case.write_bytes(content)
    with Server(damaged) as running:
        statuses = {
            caller.ask(running, "GET", f"/v1/batch?index={n}&gate=off&synthesizer=analytic&unlabelled_negatives=trust")
            for n in range(8)
        }
        assert 500 in statuses, statuses
    trained = tmp_path / "trained"
    command("phantom", "--store", trained, "--labelled", 2, "--unlabelled", 2, "--seed", 2024)
    case = sorted(path.stem for path in (trained / "cases").iterdir())[0]
    with Server(trained) as running:
        leaking = {"recipe": {"select": {"hold_out": [case]}}, "delivery": {"count": 1}}
        for path in ("/v1/stream", "/v1/recipes/validate"):
            assert caller.ask(running, "POST", path, leaking) == 409
