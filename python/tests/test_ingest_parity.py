"""The Python source hash equals the server's on every file of tests/golden/ingest (its Rust test reads the same)."""

import json
import pathlib

import pytest

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("blake3")

from freetumor.source_hash import source_hash  # noqa: E402

FOLDER = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "ingest"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_hash(name):
    """Hashes one file as it lies on disk."""
    image = nibabel.load(FOLDER / name)
    data = image.get_fdata()
    data = data[..., 0] if data.ndim == 4 else data
    assert source_hash(data, image.affine) == EXPECTED[name]["source_hash"]
