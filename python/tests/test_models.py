"""Models beside each other: load, activate, roll back, release, while cursors go on with the models they were made with."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import freetumor
from server import MODELS, Server
from test_promises import content

KEY = "the-admin-key"
RECIPE = {"seed": 7, "sizes": {"tiny": 1.0}, "pools": {"unlabelled_host": 1.0}, "patches_per_epoch": 1000}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the bundled models, the same with other thresholds, and damaged ones."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("first", "second", "damaged"):
        shutil.copytree(MODELS, folder / name)
    manifest = folder / "second" / "critic.json"
    critic = json.loads(manifest.read_text())
    critic["training"]["steps"] = critic["training"].get("steps", 0) + 1
    manifest.write_text(json.dumps(critic))
    weights = folder / "damaged" / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "no-models").mkdir()
    return folder


class Admin:
    """Asks the routes that change the server."""

    def __init__(self, server: Server) -> None:
        self.url = server.url

    def post(self, path: str) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"{self.url}/v1/models/{path}", b"", {"Authorization": f"Bearer {KEY}"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ask(self, path: str, body: object = None) -> bytes:
        """Returns an answer of the routes of trainings; with a body the request is a POST."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/trainings{path}", data, headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read()

    def states(self) -> dict[str, str]:
        with urllib.request.urlopen(f"{self.url}/v1/models") as answer:
            return {entry["name"]: entry["state"] for entry in json.load(answer)["models"]}


def serve(store: Path, root: Path, *arguments: object) -> Server:
    settings = {"FREETUMOR__SERVER__ADMIN_KEYS": KEY}
    return Server(store, "--models-root", root, *arguments, env=settings, models=root / "first")


def bundle_of(url: str, recipe: dict) -> str:
    return next(iter(freetumor.stream(url, recipe, batch_size=1, count=1))).cursor.bundle


def test_models_are_exchanged_under_running_trainers(store: Path, root: Path) -> None:
    with serve(store, root) as running:
        admin, url = Admin(running), running.url
        assert admin.states() == {"first": "active", "second": "available", "damaged": "available"}
        whole = [content(batch) for batch in freetumor.stream(url, RECIPE, batch_size=1, count=4)]
        open_stream = iter(freetumor.stream(url, RECIPE, batch_size=1, count=4))
        batch = next(open_stream)
        cursor, old = batch.cursor, batch.cursor.bundle

        status, entry = admin.post("second/load")
        assert status == 200 and entry["state"] == "held" and entry["warm_up"]["patches"] == 4, entry
        new = entry["bundle"]
        assert new != old and bundle_of(url, RECIPE) == old
        assert bundle_of(url, {**RECIPE, "bundle": "second"}) == bundle_of(url, {**RECIPE, "bundle": new}) == new

        assert admin.post("second/activate")[0] == 200
        assert bundle_of(url, RECIPE) == new
        # The stream that is open and the cursor that was kept go on with the old models, byte for byte.
        assert [content(batch) for batch in open_stream] == whole[1:]
        resumed = freetumor.stream(url, RECIPE, batch_size=1, count=3, cursor=cursor)
        assert [content(batch) for batch in resumed] == whole[1:]
        info = json.loads(running.get("/v1/info")[1])
        assert info["default"]["bundle"] == new
        scrape = running.get("/metrics")[1].decode()
        assert [line.endswith(" 1") for line in scrape.splitlines() if "models_info{" in line and new in line] == [True]

        assert admin.post("roll-back")[1]["name"] == "first" and bundle_of(url, RECIPE) == old
        kept = next(iter(freetumor.stream(url, {**RECIPE, "bundle": "second"}, batch_size=1, count=2))).cursor
        assert admin.post("second/release")[0] == 204
        with pytest.raises(freetumor.ProblemError) as gone:
            next(iter(freetumor.stream(url, RECIPE, batch_size=1, cursor=kept)))
        assert gone.value.status == 410
        with pytest.raises(freetumor.ProblemError) as unknown:
            next(iter(freetumor.stream(url, {**RECIPE, "bundle": "second"}, batch_size=1)))
        assert unknown.value.status == 422 and admin.states()["second"] == "available"


def test_what_cannot_be_loaded_changes_nothing(store: Path, root: Path) -> None:
    with serve(store, root) as running:
        admin = Admin(running)
        before = bundle_of(running.url, RECIPE)
        status, problem = admin.post("damaged/load")
        assert status == 422 and "generator.safetensors" in problem["detail"], problem
        for name in ("nothing", "no-models", "..", "..%2Ffirst", "%2Fetc"):
            assert admin.post(f"{name}/load")[0] == 404, name
        assert admin.post("second/activate")[0] == 404
        assert admin.post("first/release")[0] == 409
        assert admin.post("roll-back")[0] == 409
        assert bundle_of(running.url, RECIPE) == before
        request = urllib.request.Request(f"{running.url}/v1/models/second/load", b"", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 401


#: A steered training of seconds on the generator's gated lesions.
SEGMENTOR = {
    "widths": [8, 16], "steps": 9, "batch_size": 1, "checkpoint_every": 3,
    "recipe": {**RECIPE, "sizes": {"tiny": 0.5, "small": 0.5}, "patch": [32, 32, 32], "unlabelled_negatives": "trust"},
    "split": {"folds": 2}, "validation": {"every": 3, "cases": 1}, "steering": {"enabled": True},
    "held_out": {"cases": 1, "window": {"window": [32, 32, 32], "overlap": 0.0}},
}


def test_a_training_on_gated_lesions_becomes_models_that_serve_also_after_a_restart(
    store: Path, root: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(root / "first", models / "first")
    with serve(store, models, "--jobs-dir", tmp_path / "jobs") as running:
        admin = Admin(running)
        admin.ask("", {"name": "job", "segmentor": SEGMENTOR})
        told = admin.ask("/job/events").decode()
        assert "event: finished" in told, told
        # What it learnt from is counted as what clients get, and which mix it learns from is a metric.
        scrape = running.get("/metrics")[1].decode().splitlines()
        value = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in scrape if line and line[0] != "#"}
        attempts = sum(n for name, n in value.items() if name.startswith("freetumor_attempts_total"))
        handed = sum(n for name, n in value.items() if name.startswith("freetumor_patches_total"))
        assert handed == 9 <= attempts, value
        times = [value[f'freetumor_stage_seconds_count{{stage="{stage}"}}'] for stage in ("learn", "validate")]
        assert times == [9, 3]
        mixes = [json.loads(line) for line in admin.ask("/job/files/segmentor.mixes.jsonl").splitlines()]
        assert [mix["from_step"] for mix in mixes] == [3, 6, 9]
        assert value["freetumor_training_mix"] == 3

        admin.ask("/job/promote/next", {})
        names = {path.name for path in (models / "next").iterdir()}
        assert names >= {"critic.json", "generator.json", "discriminator.json"}, names
        same = "generator.safetensors"
        assert (models / "next" / same).read_bytes() == (models / "first" / same).read_bytes()
        status, entry = admin.post("next/load")
        assert status == 200 and entry["warm_up"]["attempts"] >= 1, entry
        assert admin.post("next/activate")[0] == 200
        batch = next(iter(freetumor.stream(running.url, RECIPE, batch_size=1, count=2)))
        assert batch.cursor.bundle == entry["bundle"]
        following = [content(batch) for batch in freetumor.stream(running.url, RECIPE, batch_size=1, count=2)]
    # Killed, and started again as before: the models that were active serve, and cursors go on.
    with serve(store, models) as running:
        assert Admin(running).states() == {"first": "held", "next": "active"}
        resumed = freetumor.stream(running.url, RECIPE, batch_size=1, count=1, cursor=batch.cursor)
        assert [content(batch) for batch in resumed] == following[1:]
