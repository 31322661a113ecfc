"""What the fault tests share: the real server, its store, and what a stream holds when nothing goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Run as a script of its own, or with the client's tests: the same server either way.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python" / "tests"))

from server import Server, command  # noqa: E402
from trainer import Epoch, epoch_of  # noqa: E402


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "store"
    command("phantom", "--store", path, "--labelled", 2, "--unlabelled", 2, "--seed", 5)
    return path


@pytest.fixture(scope="session")
def whole(store: Path) -> Epoch:
    """The uninterrupted epoch that every run is held against."""
    with Server(store) as server:
        return epoch_of(server.url)
