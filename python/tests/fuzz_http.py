"""Fuzzes the real server from its own OpenAPI document with schemathesis: no 5xx, no status that is not documented.

    pip install schemathesis
    python python/tests/fuzz_http.py --seconds 900

`test_operator.py` runs it for half a minute where schemathesis is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from server import Server, command

KEY = "fuzz-admin-key"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "unsupported_method", "allow_header_conformance", "ignored_auth",
)
HOOKS = '''
import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    """A stream that was asked for without an end is read for two batches only."""
    body = case.body
    if case.path != "/v1/stream" or not (body is None or isinstance(body, dict)):
        return
    delivery = (body or {}).get("delivery", {})
    if isinstance(delivery, dict) and delivery.get("count") is None:
        case.body = {**(body or {}), "delivery": {**delivery, "count": 2}}
    elif isinstance(delivery, dict) and isinstance(delivery["count"], int) and delivery["count"] > 2:
        delivery["count"] = 2
'''


def tool() -> str | None:
    """Returns where schemathesis is, beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name("schemathesis")
    return str(beside) if beside.exists() else shutil.which("schemathesis")


def fuzz(store: Path, seconds: int, *, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs schemathesis against a server of its own and returns what it said."""
    found = tool()
    assert found is not None, "schemathesis is not installed"
    settings = {"FREETUMOR__SERVER__READ_KEYS": "fuzz-read-key", "FREETUMOR__SERVER__ADMIN_KEYS": KEY}
    settings["FREETUMOR__JOBS__MAX_QUEUED"] = "1"
    with tempfile.TemporaryDirectory() as folder, Server(store, "--jobs-dir", Path(folder) / "jobs", env=settings) as running:
        (Path(folder) / "hooks.py").write_text(HOOKS)
        occupy(running)
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": folder}
        arguments = [
            found, "run", f"{running.url}/openapi.json", "--checks", ",".join(CHECKS), "--max-time", str(seconds),
            "-H", f"Authorization: Bearer {KEY}", "--exclude-path", "/v1/drain", "--request-timeout", "60",
            "--suppress-health-check", "all", "--continue-on-failure", "--warnings", "off",
            *(["--seed", str(seed)] if seed is not None else []),
        ]
        done = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds + 300, check=False
        )
        status, _ = running.get("/readyz")
        assert status == 200, f"the server did not survive:\n{running.logged()}"
        return done


def occupy(running: Server) -> None:
    """Fills the places of trainings: what is submitted after these is checked, and then refused."""
    endless = {
        "widths": [2, 2], "steps": 1 << 40, "batch_size": 1,
        "recipe": {"synthesizer": "analytic", "gate": {"enabled": False}, "patch": [16, 16, 16],
                   "unlabelled_negatives": "trust"},
    }
    for name in ("endless", "waiting"):
        body = json.dumps({"name": name, "segmentor": endless}).encode()
        status, answer = running.get("/v1/trainings", body, key=KEY)
        assert status == 201, answer
        while name == "endless" and json.loads(running.get("/v1/trainings/endless", key=KEY)[1])["state"] == "queued":
            time.sleep(0.01)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "store"
        command("phantom", "--store", made, "--labelled", 2, "--unlabelled", 2, "--seed", 5)
        result = fuzz(made, options.seconds, seed=options.seed)
    print(result.stdout, result.stderr)
    sys.exit(result.returncode)
