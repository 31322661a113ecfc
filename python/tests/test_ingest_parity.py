"""The Python source hash and fingerprint equal the server's on the files of tests/golden (its Rust tests read the same)."""

import json
import pathlib

import numpy
import pytest

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("blake3")

from freetumor.fingerprint import fingerprint  # noqa: E402
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


FINGERPRINTS = json.loads((FOLDER.parent / "fingerprints.json").read_text())


def body():
    """The volume that tests/near_duplicates.rs makes by the same rule, as (z, y, x)."""
    z, y, x = numpy.indices((50, 90, 110))
    away = (y - 44) ** 2 * (14 + z % 9) + (x - 56) ** 2 * 10
    noise = (z * 7919 + y * 104_729 + x * 1_299_709) % 41 - 20
    hu = numpy.select([away < 1500, away < 9000, away < 16_000], [400, 60, -105], -1000)
    return hu + noise


@pytest.mark.parametrize("flip", [False, True])
def test_fingerprint_of_a_made_volume(flip):
    """Any orientation of the same volume has the same fingerprint."""
    array = body().transpose(2, 1, 0)
    affine = numpy.diag([0.9, 1.25, 2.5, 1.0])
    if flip:
        array, affine = array[::-1, ::-1], numpy.diag([-0.9, -1.25, 2.5, 1.0])
    assert fingerprint(array, affine) == FINGERPRINTS["body"]


@pytest.mark.parametrize("name", sorted(set(FINGERPRINTS) - {"body"}))
def test_fingerprint_of_a_real_ct(name):
    """Reads a real CT, where the folder of data is there."""
    path = FOLDER.parents[3] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    image = nibabel.load(path)
    assert fingerprint(image.get_fdata(), image.affine) == FINGERPRINTS[name]
