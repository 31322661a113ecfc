"""What an operator and a stranger's client do: scrape, lint, read logs, rotate keys, call with curl, wrk, fetch, urllib."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import fuzz_http
import freetumor
from server import ROOT, Server

DEPLOY = ROOT / "deploy"


def needs(program: str) -> str:
    """Returns where a program is; the test is skipped, saying so, where it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


def used(server: Server) -> str:
    """Uses every route once and returns a scrape."""
    next(iter(freetumor.stream(server.url, {"synthesizer": "analytic"}, count=1)))
    server.get("/v1/batch?organ=nothing")
    server.get("/nothing")
    return server.get("/metrics")[1].decode()


def test_promtool_accepts_a_live_scrape(server: Server) -> None:
    promtool = needs("promtool")
    scrape = used(server)
    linted = run(promtool, "check", "metrics", stdin=scrape)
    assert linted.returncode == 0 and not linted.stderr, linted.stdout + linted.stderr
    assert scrape.count("# HELP freetumor_") == scrape.count("# TYPE freetumor_")


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_accepts_what_is_deployed(arguments: tuple[str, ...]) -> None:
    *verbs, name = arguments
    checked = run(needs("promtool"), *verbs, DEPLOY / "prometheus" / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_metric_of_dashboard_and_alerts_is_scraped_or_declared(server: Server) -> None:
    declared = set(re.findall(r"`(freetumor_\w+)`", (ROOT / "docs/reference/metrics.md").read_text()))
    files = [DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana" / "freetumor.json"]
    named = {name for file in files for name in re.findall(r"\bfreetumor_[a-z_]+", file.read_text())}
    assert len(named) > 15
    unknown = {name for name in named if re.sub(r"_(bucket|sum|count)$", "", name) not in declared}
    assert not unknown
    scraped = set(re.findall(r"^# TYPE (freetumor_\w+)", used(server), re.MULTILINE))
    assert scraped <= declared, scraped - declared


def expressions() -> list[str]:
    """Everything that dashboard and alerts ask Prometheus."""
    dashboard = json.loads((DEPLOY / "grafana" / "freetumor.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    return asked + re.findall(r"expr: (.+?)\n(?= *(?:for|labels|annotations|- |$))", rules + "\n", re.DOTALL)


def test_dashboard_and_alerts_ask_for_labels_that_their_metrics_have() -> None:
    reference = (ROOT / "docs/reference/metrics.md").read_text()
    table = re.findall(r"^\| `(freetumor_\w+)` \|[^|]*\|[^|]*\|([^|]*)\|", reference, re.MULTILINE)
    labels = {name: set(re.findall(r"\w+", said)) for name, said in table}
    asked = expressions()
    assert len(asked) > 30
    for expression in asked:
        names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bfreetumor_[a-z_]+", expression)}
        known = {"instance", "job", "le"}.union(*(labels[name] for name in names))
        used = set(re.findall(r"(\w+) *(?:=~|!~|!=|=)", expression))
        used |= {label for group in re.findall(r"\bby *\(([^)]*)\)", expression) for label in re.findall(r"\w+", group)}
        assert used <= known, f"{used - known} in {expression}"


def test_logs_are_json_with_request_ids(store: Path) -> None:
    settings = {"FREETUMOR__LOG__FORMAT": "json", "FREETUMOR__LOG__LEVEL": "info,freetumor::http=debug"}
    with Server(store, env=settings) as running:
        request = urllib.request.Request(
            f"{running.url}/v1/stream", b'{"recipe": {"synthesizer": "analytic"}, "delivery": {"count": 1}}',
            {"X-Request-Id": "trainer-7"},
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["X-Request-Id"] == "trainer-7"
            answer.read()
        lines = [json.loads(line) for line in running.logged().splitlines()]
    ours = [line for line in lines if line.get("span", {}).get("request_id") == "trainer-7"]
    said = [line["fields"]["message"] for line in ours]
    assert "answered" in said and "a stream ended" in said, lines


def test_keys_are_rotated_by_file_and_signal(store: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old-key\n")
    with Server(store, env={"FREETUMOR__SERVER__READ_KEYS_FILE": str(keys)}) as running:

        def status(key: str) -> int:
            request = urllib.request.Request(f"{running.url}/v1/info", headers={"Authorization": f"Bearer {key}"})
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        assert (status("old-key"), status("new-key")) == (200, 401)
        keys.write_text("old-key\nnew-key\n")
        running.process.send_signal(1)  # SIGHUP
        for _ in range(100):
            if status("new-key") == 200:
                break
        assert (status("old-key"), status("new-key")) == (200, 200)
        assert "old-key" not in running.logged() and "new-key" not in running.logged()


BATCH = "/v1/batch?index=0&batch_size=2&format=npz&outputs=source,soft_mask&synthesizer=analytic&gate=off"


def check_npz(content: bytes) -> None:
    with np.load(io.BytesIO(content)) as arrays:
        assert arrays["image"].shape == arrays["label"].shape and arrays["image"].shape[:2] == (2, 1)
        assert {"image", "label", "source", "soft_mask", "meta"} <= set(arrays.files)


def test_curl_works(server: Server, tmp_path: Path) -> None:
    curl, file = needs("curl"), tmp_path / "batch.npz"
    assert run(curl, "-sSf", "-o", file, server.url + BATCH).returncode == 0
    check_npz(file.read_bytes())
    frames = tmp_path / "frames"
    body = '{"recipe": {"synthesizer": "analytic"}, "delivery": {"count": 2, "batch_size": 1}}'
    assert run(curl, "-sSf", "--no-buffer", "-o", frames, "-d", body, server.url + "/v1/stream").returncode == 0
    assert frames.read_bytes().count(b"FTUM") >= 4


def test_the_standard_library_works(server: Server) -> None:
    with urllib.request.urlopen(server.url + BATCH) as answer:
        check_npz(answer.read())


FETCH = """
const [url] = process.argv.slice(1);
const answer = await fetch(url + "/v1/stream", {method: "POST",
    body: JSON.stringify({recipe: {synthesizer: "analytic"}, delivery: {count: 2, batch_size: 1}})});
if (!answer.ok) throw new Error(await answer.text());
let bytes = new Uint8Array(0);
const kinds = [];
for await (const chunk of answer.body) {
    bytes = bytes.length ? new Uint8Array(Buffer.concat([bytes, chunk])) : chunk;
    while (bytes.length >= 32) {
        const view = new DataView(bytes.buffer, bytes.byteOffset);
        const length = 32 + view.getUint32(12, true) + Number(view.getBigUint64(16, true));
        if (bytes.length < length) break;
        kinds.push(view.getUint16(6, true));
        bytes = bytes.slice(length);
    }
}
const refused = await fetch(url + "/v1/batch?idx=1");
console.log(JSON.stringify({kinds, left: bytes.length, field: (await refused.json()).field}));
"""


def test_fetch_works(server: Server) -> None:
    said = run(needs("node"), "--input-type=module", "-e", FETCH, server.url)
    assert said.returncode == 0, said.stderr
    result = json.loads(said.stdout)
    kinds = [kind for kind in result["kinds"] if kind != 3]
    assert (kinds, result["left"], result["field"]) == ([1, 2, 2, 4], 0, "idx")


def test_wrk_works(server: Server) -> None:
    said = run(needs("wrk"), "-t1", "-c8", "-d2s", "--latency", server.url + "/v1/info")
    assert said.returncode == 0 and "Non-2xx" not in said.stdout and "Socket errors" not in said.stdout, said.stdout
    assert float(re.search(r"Requests/sec:\s+([\d.]+)", said.stdout).group(1)) > 100, said.stdout


def test_no_page_of_another_origin_may_read(server: Server) -> None:
    request = urllib.request.Request(server.url + "/v1/info", headers={"Origin": "https://evil.example"})
    with urllib.request.urlopen(request) as answer:
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_half_a_minute_of_schemathesis_finds_nothing(store: Path) -> None:
    if fuzz_http.tool() is None:
        pytest.skip("schemathesis is not installed")
    done = fuzz_http.fuzz(store, 30)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
