"""Runs the real server for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("FREETUMOR_BINARY", ROOT / "target" / "release" / "freetumor"))
MODELS = Path(os.environ.get("FREETUMOR_TEST_MODELS", ROOT / "assets" / "demo"))


def command(*arguments: object, check: bool = True) -> str:
    """Runs a subcommand to its end and returns what it printed."""
    done = subprocess.run([BINARY, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    if check and done.returncode != 0:
        raise AssertionError(f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


class Server:
    """A server on a free port."""

    def __init__(
        self, store: Path, *arguments: object, port: int = 0, env: dict[str, str] | None = None, models: Path = MODELS,
    ) -> None:
        # A file, because nobody reads a pipe while the server runs.
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [BINARY, "serve", "--config", "configs/demo.toml", "--store", store, "--models", models,
             "--bind", f"127.0.0.1:{port}", *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://([\d.]+):(\d+)", line):
                self.url = found.group(0)
                self.port = int(found.group(2))
                break
        else:
            raise AssertionError(f"the server ended before it printed its address:\n{self.logged()}")
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.get("/readyz")[0] == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, f"not ready after a minute:\n{self.logged()}"
            time.sleep(0.05)

    def get(self, path: str, body: bytes | None = None, key: str | None = None) -> tuple[int, bytes]:
        """Returns status and body; with a body of its own, the request is a POST of JSON."""
        headers = {"Content-Type": "application/json", **({"X-API-Key": key} if key else {})}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def logged(self) -> str:
        """Returns what the server logged so far."""
        self.log.seek(0)
        return self.log.read()

    def memory_mb(self) -> float:
        """Returns the process's own memory: resident, without file mappings."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) / 1024

    def kill(self) -> None:
        """Ends the server without warning."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """Asks the server to drain."""
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
