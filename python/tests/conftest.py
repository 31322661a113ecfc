"""What tests of the real server share."""

from __future__ import annotations

from pathlib import Path

import pytest

from server import Server, command


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "store"
    command("phantom", "--store", path, "--labelled", 2, "--unlabelled", 2, "--seed", 5)
    return path


@pytest.fixture(scope="session")
def server(store: Path):
    with Server(store) as running:
        yield running
