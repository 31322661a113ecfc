"""The promises of README.md, against the real server with the bundled models on a phantom store."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import freetumor
from server import MODELS, Server, command

RECIPE = {"seed": 11, "gate": {"retries": 1}}
#: Where the models do not matter: nothing judges, nothing waits for a network.
ANALYTIC = {"seed": 7, "synthesizer": "analytic", "gate": {"enabled": False}, "patches_per_epoch": 100_000}
TRAINED_SEED = 2024  # of the phantom store that the bundled models were trained on (docs/demo-models.md)
OUTPUTS = ("source", "soft_mask", "lesion_instance")


def content(batch: freetumor.Batch) -> dict[int, tuple]:
    """Returns everything that a batch's indices stand for."""
    arrays = list(batch.arrays.values())
    return {meta.index: (*(array[i].tobytes() for array in arrays), repr(meta)) for i, meta in enumerate(batch.meta)}


def fetch(url: str, count: int | None, *, world: int = 1, recipe: dict = RECIPE, **delivery) -> dict[int, tuple]:
    """Returns the content of all ranks' indices."""
    patches: dict[int, tuple] = {}
    for rank in range(world):
        for batch in freetumor.stream(url, recipe, rank=rank, world=world, count=count, image="i16", **delivery):
            new = content(batch)
            assert not patches.keys() & new.keys(), "an index came twice"
            patches |= new
    return patches


def stalled_reader(server: Server, recipe: dict) -> socket.socket:
    """Opens a stream and never reads a byte of it."""
    body = json.dumps({"recipe": recipe, "delivery": {"batch_size": 8}}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.sendall(b"POST /v1/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def stream_when_free(server: Server) -> freetumor.Stream:
    """Opens a stream as soon as the server admits one."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return freetumor.stream(server.url, ANALYTIC)
        except freetumor.ProblemError as refusal:
            assert refusal.status == 429 and time.monotonic() < deadline, refusal
            time.sleep(0.1)


def damaged_copy(store: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Returns a copy of a store and its case files."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    return copy, sorted((copy / "cases").iterdir())


def test_p1_same_bytes_whatever_the_server_and_the_cut(store: Path) -> None:
    one = {"RAYON_NUM_THREADS": "1", "FREETUMOR__STREAM__PREPARATION_THREADS": "1"}
    with Server(store, env=one) as first:
        reference = fetch(first.url, 2, batch_size=4, outputs=OUTPUTS)
    with Server(store, env={"FREETUMOR__STREAM__PREPARATION_THREADS": "3"}) as second:
        assert fetch(second.url, 8, batch_size=1, outputs=OUTPUTS) == reference
        assert fetch(second.url, 2, batch_size=2, world=2, codec="zstd", outputs=OUTPUTS) == reference
    assert sorted(reference) == list(range(8))
    assert len({image for image, *_ in reference.values()}) == 8, "patches repeat"


def test_p2_a_killed_server_loses_and_repeats_nothing(store: Path) -> None:
    with Server(store) as server:
        whole = fetch(server.url, 4)
    got: dict[int, tuple] = {}
    with Server(store) as server:
        # Far more than the connection's buffers hold, so that the kill always cuts.
        stream = freetumor.stream(server.url, RECIPE, batch_size=2, count=1000, image="i16", patience=0)
        with pytest.raises(freetumor.StreamCut) as caught:
            for batch in stream:
                got |= content(batch)
                consumed = batch.cursor
                if batch.step == 0:
                    server.kill()
    # What had arrived but was cut off inside a frame is not lost: the cursor stands where the consumer does.
    assert caught.value.cursor == consumed and consumed.next_index == len(got)
    with Server(store, port=server.port) as again:
        rest = fetch(again.url, max(1, 4 - len(got) // 2), cursor=consumed)
    assert not rest.keys() & got.keys()
    joined = {**got, **rest}
    assert sorted(joined) == list(range(len(joined)))
    assert {index: joined[index] for index in whole} == whole


def test_p2_an_epoch_ends_with_a_frame_and_covers_every_index(server: Server) -> None:
    seen = fetch(server.url, None, world=2, batch_size=1, recipe={**ANALYTIC, "patches_per_epoch": 5})
    assert sorted(seen) == list(range(6)), "filled to the same number of batches on both ranks"


def test_p2_a_partial_epoch_has_every_index_once_and_as_many_batches_on_every_rank(server: Server) -> None:
    recipe, indices = {**ANALYTIC, "patches_per_epoch": 10}, []
    for rank in range(3):
        stream = freetumor.stream(server.url, recipe, rank=rank, world=3, batch_size=3, last_batch="partial")
        batches = list(stream)
        # One index is left for three ranks.
        assert [len(batch) for batch in batches] == [3, 1 if rank == 0 else 0]
        assert batches[1].image.shape[1:] == batches[0].image.shape[1:]
        assert stream.end_reason == "end_of_epoch" and batches[1].cursor.next_index == 10
        indices += [meta.index for batch in batches for meta in batch.meta]
    assert sorted(indices) == list(range(10))


def test_p3_two_trainers_of_a_recipe_share_what_is_made(server: Server) -> None:
    recipe = {**ANALYTIC, "seed": 77}
    alone = fetch(server.url, 12, recipe=recipe)
    streams = [freetumor.stream(server.url, recipe, count=12, image="i16", prefetch=0) for _ in range(2)]
    got: list[dict[int, tuple]] = [{}, {}]
    reused = 0
    for batches in zip(*streams):
        for mine, batch in zip(got, batches):
            mine |= content(batch)
            reused += len(batch.reused)
    assert got == [alone, alone]
    assert reused >= 6, "two streams in step made their patches twice"
    assert b"freetumor_patches_reused_total" in server.get("/metrics")[1]


def test_p2_another_streams_cursor_is_refused(server: Server) -> None:
    cursor = next(freetumor.stream(server.url, ANALYTIC)).cursor
    for change, status, field in [("recipe", 409, "recipe"), ("snapshot", 409, "snapshot"), ("bundle", 410, None)]:
        wrong = {**cursor.to_dict(), change: "ab" * 32}
        with pytest.raises(freetumor.ProblemError) as caught:
            freetumor.stream(server.url, ANALYTIC, cursor=wrong)
        assert caught.value.status == status
        assert field is None or field in (caught.value.field or "")
    assert next(freetumor.stream(server.url, ANALYTIC, cursor=cursor)).meta[0].index == cursor.next_index


def test_p3_readers_that_stop_do_not_grow_the_server(server: Server) -> None:
    fetch(server.url, 8, recipe=ANALYTIC)  # warm: buffers and caches exist
    body = json.dumps({"recipe": ANALYTIC, "delivery": {"batch_size": 8}}).encode()
    stream_mb = json.loads(server.get("/v1/recipes/validate", body)[1])["stream_bytes"] / 2**20
    window_mb = 8 * 48**3 * 7 / 2**20  # patches ahead x voxels x bytes of image, source, label and masks
    grown = [server.memory_mb()]
    stalled = [stalled_reader(server, ANALYTIC) for _ in range(3)]
    deadline = time.monotonic() + 60
    # The buffers fill as fast as the machine allows; then nothing may move while nobody reads.
    while len(grown) < 7 or max(grown[-5:]) - min(grown[-5:]) > 2:
        assert time.monotonic() < deadline, ("still growing while nobody reads", grown)
        time.sleep(1)
        grown.append(server.memory_mb())
    assert grown[-1] - grown[0] < 3 * (stream_mb + window_mb), grown
    started = time.monotonic()
    assert len(fetch(server.url, 10, recipe=ANALYTIC)) == 20, "the others are served"
    assert time.monotonic() - started < 10, "the others do not wait for those who stopped"
    for connection in stalled:
        connection.close()


def test_p3_readers_that_stop_hold_their_own_place_and_give_it_back(store: Path) -> None:
    with Server(store, env={"FREETUMOR__SERVER__MAX_STREAMS": "3"}) as server:
        stalled = [stalled_reader(server, ANALYTIC) for _ in range(2)]
        time.sleep(0.5)
        with freetumor.stream(server.url, ANALYTIC) as third:
            next(third)
            with pytest.raises(freetumor.ProblemError) as caught:
                freetumor.stream(server.url, ANALYTIC)
            assert caught.value.status == 429 and caught.value.retry_after > 0
        for connection in stalled:
            connection.close()
        streams = [stream_when_free(server) for _ in range(3)]
        assert all(len(next(stream)) == 2 for stream in streams)
        for stream in streams:
            stream.close()


def test_p4_provenance_tells_what_the_gate_saw(server: Server) -> None:
    recipe = {**RECIPE, "pools": {"unlabelled_host": 1}, "fallback": "best"}
    for batch in freetumor.stream(server.url, recipe, batch_size=1, count=4):
        meta = batch.meta[0]
        assert meta.pool == "unlabelled_host" and meta.failed is None
        assert meta.outcome in ("accepted", "best_after_k", "unplaceable")
        assert 1 <= meta.attempts <= 2
        assert (meta.outcome == "unplaceable") == (not meta.lesions)
        for lesion in meta.lesions:
            scores = lesion.gate
            passes = (scores.recall >= scores.recall_threshold and scores.precision >= scores.precision_threshold
                      and scores.before <= 0.1)
            assert passes == (meta.outcome == "accepted"), meta


@pytest.mark.parametrize("pool", ["unlabelled_host", "labelled_host", "labelled_real"])
def test_p5_only_the_lesion_changes(server: Server, pool: str) -> None:
    recipe = {**ANALYTIC, "pools": {pool: 1}}
    stream = freetumor.stream(server.url, recipe, batch_size=1, count=12, image="i16", outputs=OUTPUTS)
    changed = 0
    for batch in stream:
        meta, label = batch.meta[0], batch.label[0, 0]
        image, source, soft = batch.image[0, 0], batch.source[0, 0], batch.soft_mask[0, 0]
        tumour = label == stream.header.labels[f"{meta.organ}_tumour"]
        assert np.array_equal(image[soft == 0], source[soft == 0])
        assert np.array_equal(batch.lesion_instance[0, 0] > 0, soft >= 128)
        # Labelled cases have real tumours beside the lesion.
        assert np.array_equal(tumour, soft >= 128) if pool == "unlabelled_host" else tumour[soft >= 128].all()
        if meta.outcome == "accepted":
            assert meta.lesions[0].diameter_mm > 0 and meta.attempts == 1
            changed += bool((image != source).any())
    assert changed == 0 if pool == "labelled_real" else changed >= 8


def test_p6_a_flipped_byte_is_an_error_that_names_the_file(store: Path, tmp_path: Path) -> None:
    damaged, cases = damaged_copy(store, tmp_path)
    for case in cases:
        data = bytearray(case.read_bytes())
        data[len(data) // 2] ^= 1
        case.write_bytes(bytes(data))
    with Server(damaged) as server:
        with pytest.raises(freetumor.PatchError) as caught:
            for _ in freetumor.stream(server.url, ANALYTIC, batch_size=1, count=20):
                pass
        assert any(case.name in str(caught.value) for case in cases), caught.value
        batches = list(freetumor.stream(server.url, ANALYTIC, batch_size=1, count=4, image="i16", on_failed="skip"))
        failed = [batch for batch in batches if batch.meta[0].failed]
        assert len(batches) == 4 and failed
        # Damage is never delivered, and nothing is learnt from what stands in its place.
        assert all(not batch.image.any() and (batch.label == 255).all() for batch in failed)
        assert server.get("/livez")[0] == 200


def test_p6_a_file_truncated_under_the_server_does_not_kill_it(store: Path, tmp_path: Path) -> None:
    shrinking, cases = damaged_copy(store, tmp_path)
    with Server(shrinking) as server:
        assert len(fetch(server.url, 4, recipe=ANALYTIC)) == 8  # every case is mapped now
        for case in cases:
            with case.open("r+b") as file:
                file.truncate(case.stat().st_size // 3)
        with pytest.raises(freetumor.PatchError) as caught:
            fetch(server.url, 8, recipe={**ANALYTIC, "seed": 99})
        assert any(case.name in str(caught.value) for case in cases), caught.value
        assert server.get("/livez")[0] == 200


def test_p7_holding_out_a_case_that_the_models_saw_is_refused(server: Server, store: Path, tmp_path: Path) -> None:
    trained = tmp_path / "store"
    command("phantom", "--store", trained, "--labelled", 2, "--unlabelled", 2, "--seed", TRAINED_SEED)
    manifests = [json.loads(path.read_text()) for path in MODELS.glob("*.json") if "report" not in path.name]
    seen = {case for manifest in manifests for case in manifest["training"]["case_ids"]}
    case = next(path.stem for path in sorted((trained / "cases").iterdir()) if path.stem in seen)
    with Server(trained) as other:
        with pytest.raises(freetumor.ProblemError) as caught:
            freetumor.stream(other.url, {**RECIPE, "select": {"hold_out": [case]}}, count=1)
        assert caught.value.status == 409 and case in str(caught.value)
    # Cases that no model saw may be held out.
    case = sorted(path.stem for path in (store / "cases").iterdir())[0]
    freetumor.stream(server.url, {**RECIPE, "select": {"hold_out": [case]}}, count=1).close()


def test_batch_over_plain_http_is_identical_and_numpy_reads_it(server: Server) -> None:
    path = "/v1/batch?index=3&batch_size=2&format=npz&image=i16&outputs=source,soft_mask&seed=11"
    first, second = server.get(path), server.get(path)
    assert first == second and first[0] == 200
    arrays = np.load(io.BytesIO(first[1]), allow_pickle=False)
    assert arrays["image"].shape == arrays["label"].shape == (2, 1, 48, 48, 48)
    assert "time" not in json.dumps(json.loads(str(arrays["meta"])))


def test_sigterm_ends_streams_with_a_cursor(store: Path) -> None:
    with Server(store) as server:
        stream = freetumor.stream(server.url, RECIPE, batch_size=1, count=500, image="i16", patience=0)
        got = content(next(stream))
        server.terminate()
        with pytest.raises(freetumor.StreamCut, match="shutdown") as caught:
            for batch in stream:
                got |= content(batch)
        assert caught.value.cursor.next_index == len(got)
        assert server.process.wait(timeout=30) == 0


def test_sigterm_does_not_wait_for_readers_that_stopped(store: Path) -> None:
    with Server(store, env={"FREETUMOR__SERVER__DRAIN_SECONDS": "2"}) as server:
        connection = stalled_reader(server, ANALYTIC)
        time.sleep(1)
        server.terminate()
        assert server.process.wait(timeout=15) == 0
        connection.close()


def test_a_refused_connection_says_where() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(freetumor.StreamCut, match=str(port)):
        freetumor.stream(f"http://127.0.0.1:{port}")


def test_models_in_the_repository_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.iterdir()) <= 4 * 1024 * 1024
