"""MONAI's items against the stream's arrays, MONAI's own reader and its loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

monai = pytest.importorskip("monai", reason="needs MONAI: pip install './python[monai]'")
torch = pytest.importorskip("torch")
nibabel = pytest.importorskip("nibabel")

import freetumor  # noqa: E402
from freetumor.monai import StreamItems  # noqa: E402
from nnunet_raw import real_recipe  # noqa: E402
from server import Server  # noqa: E402
from test_promises import ANALYTIC  # noqa: E402

AUGMENTED = {**ANALYTIC, "augment": {"flip": [0.5, 0.5, 0.5], "rotate90": 0.5, "intensity": 0}, "patches_per_epoch": 12}


def test_items_lie_where_the_streams_voxels_do(server: Server) -> None:
    batches = freetumor.stream(server.url, AUGMENTED, batch_size=2, image="i16")
    items = iter(StreamItems(server.url, AUGMENTED, batch_size=2, image="i16"))
    rng = np.random.default_rng(1)
    for batch in batches:
        for i, meta in enumerate(batch.meta):
            item = next(items)
            image, label = item["image"], item["label"]
            assert isinstance(image, monai.data.MetaTensor) and image.shape == label.shape == (1, 48, 48, 48)
            assert image.meta["index"] == meta.index and image.meta["case"] == meta.case
            for z, y, x in rng.integers(0, 48, (20, 3)):
                assert image[0, x, y, z] == batch.image[i, 0, z, y, x] and label[0, x, y, z] == batch.label[i, 0, z, y, x]
                ours = meta.affine @ [z, y, x, 1]
                np.testing.assert_allclose(image.affine.numpy() @ [x, y, z, 1], ours, atol=1e-9)
    assert next(items, None) is None


def test_monais_own_reader_agrees(server: Server, tmp_path: Path) -> None:
    """A patch written as a file and loaded by MONAI has the item's voxels and affine."""
    item = next(iter(StreamItems(server.url, real_recipe(48), batch_size=1, image="i16")))
    batch = next(freetumor.stream(server.url, real_recipe(48), batch_size=1, image="i16"))
    affine = batch.meta[0].affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(batch.image[0, 0].transpose(2, 1, 0)), affine), tmp_path / "a.nii.gz")
    load = monai.transforms.Compose([
        monai.transforms.LoadImaged("image"), monai.transforms.EnsureChannelFirstd("image"),
        monai.transforms.Orientationd("image", "RAS", labels=None),
    ])
    loaded = load({"image": str(tmp_path / "a.nii.gz")})["image"]
    assert torch.equal(loaded.as_tensor().to(torch.int16), item["image"].as_tensor())
    np.testing.assert_allclose(loaded.affine.numpy(), item["image"].affine.numpy(), atol=1e-5)  # the file has f32


@pytest.mark.parametrize("workers", [0, 2])
def test_monais_loader_and_transforms(server: Server, workers: int) -> None:
    turn = monai.transforms.Compose([
        monai.transforms.RandAffined(("image", "label"), prob=1.0, rotate_range=0.3, mode=("bilinear", "nearest")),
        monai.transforms.RandSpatialCropd(("image", "label"), (32, 32, 32), random_size=False),
    ])
    data = StreamItems(server.url, AUGMENTED, batch_size=3, transform=turn)
    options = {"multiprocessing_context": "fork"} if workers else {}
    loader = monai.data.DataLoader(data, batch_size=3, num_workers=workers, **options)
    seen = []
    for batch in loader:
        assert batch["image"].shape == (3, 1, 32, 32, 32) and batch["image"].dtype == torch.float32
        assert set(np.unique(batch["label"].numpy())) <= {*data.labels.values(), 255}
        seen += [int(index) for index in batch["image"].meta["index"]]
    assert seen == list(range(12)) and len(data) == 12 and len(loader) == 4
