"""StreamDataset under PyTorch's and torchdata's own loaders, against the real server."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install './python[torch]'")
stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata: pip install './python[torch]'")

from torch.utils.data import DataLoader  # noqa: E402

import freetumor  # noqa: E402
from freetumor.torch import StreamDataset, position, to_device  # noqa: E402
from server import Server  # noqa: E402
from test_promises import ANALYTIC  # noqa: E402

EPOCH = 26
RECIPE = {**ANALYTIC, "patches_per_epoch": EPOCH}


def dataset(server: Server, **options) -> StreamDataset:
    return StreamDataset(server.url, RECIPE, with_meta=True, image="i16", **options)


def seen(item: dict) -> list[int]:
    return [meta.index for meta in item["meta"]]


def loader_of(data: StreamDataset, workers: int, kind=stateful.StatefulDataLoader, **options):
    options = {**({"multiprocessing_context": "fork"} if workers else {}), **options}
    return kind(data, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_steps_are_the_same_for_any_number_of_workers(server: Server, workers: int, world: int) -> None:
    for rank in range(world):
        data = dataset(server, rank=rank, world=world, batch_size=2)
        steps = [seen(item) for item in loader_of(data, workers, kind=DataLoader)]
        step = 2 * world
        assert steps == [[t * step + rank, t * step + world + rank] for t in range(-(-EPOCH // step))]
        assert len(data) == len(steps)


def test_items_are_the_streams_arrays(server: Server) -> None:
    expected = freetumor.stream(server.url, RECIPE, count=2, image="i16", outputs=("source",))
    items = iter(loader_of(dataset(server, outputs=("source",)), 2, kind=DataLoader))
    for batch in expected:
        item = next(items)
        assert set(item) == {"image", "label", "source", "meta"}
        for name, array in batch.arrays.items():
            assert item[name].shape == array.shape and np.array_equal(item[name].numpy(), array)
        assert repr(item["meta"]) == repr(batch.meta)


@pytest.mark.parametrize("workers, stop, every", [(0, 4, 1), (1, 1, 1), (2, 5, 1), (3, 7, 4), (3, 0, 1), (2, 13, 1)])
def test_a_stateful_loader_goes_on_exactly(server: Server, workers: int, stop: int, every: int) -> None:
    whole = [seen(item) for item in loader_of(dataset(server), workers)]
    loader = loader_of(dataset(server), workers, snapshot_every_n_steps=every)
    items = iter(loader)
    got = [seen(next(items)) for _ in range(stop)]
    state = copy.deepcopy(loader.state_dict())
    del items, loader
    again = loader_of(dataset(server), workers, snapshot_every_n_steps=every)
    again.load_state_dict(state)
    assert got + [seen(item) for item in again] == whole


@pytest.mark.parametrize("before, after", [((2, 1), (3, 1)), ((3, 1), (0, 1)), ((0, 1), (2, 2)), ((2, 2), (1, 1))])
def test_another_number_of_workers_and_ranks_sees_the_same_patches(server: Server, before, after) -> None:
    workers, world = before
    got: list[int] = []
    for rank in range(world):
        loader = loader_of(dataset(server, rank=rank, world=world), workers)
        items = iter(loader)
        for _ in range(3):
            got += seen(next(items))
        where = position(loader.state_dict())
        del items
    assert sorted(got) == list(range(len(got))), "what was seen is a prefix of the sequence"
    assert where["cursor"]["next_index"] == len(got) == 3 * 2 * world
    workers, world = after
    for rank in range(world):
        data = dataset(server, rank=rank, world=world)
        data.load_state_dict(where)
        got += [index for item in loader_of(data, workers, kind=DataLoader) for index in seen(item)]
    assert sorted(got) == list(range(len(got))) and EPOCH <= len(got) < EPOCH + 2 * max(before[1], after[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other_also_after_a_resume(server: Server, workers: int) -> None:
    data = dataset(server, batch_size=3)  # an epoch of 26 is nine steps, 27 indices
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        epochs.append([index for item in loader_of(data, workers) for index in seen(item)])
    assert sorted(sum(epochs, [])) == list(range(81))

    loader = loader_of(data, workers)
    data.set_epoch(1)
    items = iter(loader)
    got = [index for _ in range(4) for index in seen(next(items))]
    state = loader.state_dict()
    del items
    fresh = dataset(server, batch_size=3)
    again = loader_of(fresh, workers)
    again.load_state_dict(state)
    got += [index for item in again for index in seen(item)]
    assert got == epochs[1]
    fresh.set_epoch(2)
    assert [index for item in again for index in seen(item)] == epochs[2]


def test_a_state_of_an_epoch_that_has_not_begun_is_its_start(server: Server) -> None:
    data = dataset(server)
    loader = loader_of(data, 0)
    data.set_epoch(0)
    assert len(list(loader)) == len(data)
    data.set_epoch(1)
    # The state of the finished iterator, as a loop saves it that does so before it iterates.
    where = position(loader.state_dict())
    fresh = dataset(server)
    fresh.load_state_dict(where)
    assert [index for item in fresh for index in seen(item)] == list(range(EPOCH, 2 * EPOCH))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_state_of_an_epochs_end_goes_on_with_the_next(server: Server, workers: int) -> None:
    loader = loader_of(dataset(server), workers)
    assert [index for item in loader for index in seen(item)] == list(range(EPOCH))
    state = copy.deepcopy(loader.state_dict())
    data = dataset(server)
    again = loader_of(data, workers)
    again.load_state_dict(state)
    for epoch in (1, 2):
        data.set_epoch(epoch)
        got = [index for item in again for index in seen(item)]
        assert got == list(range(epoch * EPOCH, (epoch + 1) * EPOCH)), epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_the_datasets_own_state_serves_any_number_of_workers(server: Server, workers: int) -> None:
    data = dataset(server)
    items = iter(loader_of(data, 0, kind=DataLoader))
    got = [index for _ in range(3) for index in seen(next(items))]
    fresh = dataset(server)
    fresh.load_state_dict(data.state_dict())
    got += [index for item in loader_of(fresh, workers, kind=DataLoader) for index in seen(item)]
    assert sorted(got) == list(range(EPOCH))


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_indices_are_the_next_epochs(server: Server, workers: int) -> None:
    data = dataset(server, batch_size=3, last_batch="drop")  # an epoch of 26 is eight steps, 24 indices
    epochs = []
    for epoch in range(2):
        data.set_epoch(epoch)
        steps = [seen(item) for item in loader_of(data, workers)]
        assert len(steps) == len(data) == 8 and all(len(step) == 3 for step in steps)
        epochs.append(sum(steps, []))
    assert sorted(sum(epochs, [])) == list(range(48))
    with pytest.raises(ValueError, match="no whole step of 32"):
        dataset(server, batch_size=32, last_batch="drop")
    with pytest.raises(ValueError, match="expected fill or drop, got 'partial'"):
        dataset(server, last_batch="partial")


def test_persistent_workers_get_the_next_epoch(server: Server) -> None:
    data = dataset(server, steps=4)
    loader = loader_of(data, 2, kind=DataLoader, persistent_workers=True)
    got = []
    for epoch in range(3):
        data.set_epoch(epoch)
        got += [index for item in loader for index in seen(item)]
    assert got == list(range(24))


def test_a_server_that_dies_is_a_pause_in_workers_too(store) -> None:
    with Server(store) as first:
        loader = loader_of(StreamDataset(first.url, RECIPE, with_meta=True, image="i16", patience=60), 2, kind=DataLoader)
        got = []
        for item in loader:
            got += seen(item)
            if len(got) == 6:
                first.kill()
                second = Server(store, port=first.port)
    second.kill()
    assert got == list(range(EPOCH))


def test_states_of_other_streams_and_layouts_are_refused(server: Server) -> None:
    data = dataset(server)
    other = StreamDataset(server.url, {**RECIPE, "seed": 8})
    with pytest.raises(freetumor.FreeTumorError, match="another stream"):
        other.load_state_dict(data.state_dict())
    released = {**data.state_dict(), "cursor": {**data.state_dict()["cursor"], "bundle": "0" * 64}}
    with pytest.raises(freetumor.FreeTumorError, match=f'other models.*"bundle": "{"0" * 64}"'):
        data.load_state_dict(released)
    one_of_two = {**data.state_dict(), "workers": 2}
    with pytest.raises(freetumor.FreeTumorError, match="position"):
        data.load_state_dict(one_of_two)
    with pytest.raises(freetumor.FreeTumorError, match="no state"):
        position({"a": 1})
    with pytest.raises(ValueError, match="rank and world"):
        dataset(server, rank=0)


def test_to_device_keeps_order_and_meta(server: Server) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = [(seen(item), item["image"]) for item in dataset(server, steps=3)]
    moved = list(to_device(dataset(server, steps=3), device, ahead=2))
    assert [seen(item) for item in moved] == [indices for indices, _ in expected]
    for item, (_, image) in zip(moved, expected):
        assert item["image"].device.type == device and torch.equal(item["image"].cpu(), image)
