"""The measures of freetumor.quality on arrays whose edge, noise and place are known."""

import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("scipy")

from freetumor import quality  # noqa: E402

SPACING = np.array([1.0, 1.0, 1.0])


def ball(radius_mm, side=48, spacing=SPACING):
    """Returns distances in mm to the surface of a ball in the middle, negative inside."""
    grid = np.indices((side,) * 3).astype(np.float64) - side / 2 + 0.25
    return np.sqrt(sum((axis * mm) ** 2 for axis, mm in zip(grid, spacing))) - radius_mm


@pytest.mark.parametrize("ramp_mm", [2.5, 4.0, 6.0])
@pytest.mark.parametrize("contrast", [-40.0, 60.0])
def test_a_linear_ramp_has_its_width(ramp_mm, contrast):
    distance = ball(14.0)
    change = contrast * np.clip(0.5 - distance / ramp_mm, 0, 1)
    width = quality.edge_width_mm(change, change / contrast >= 0.5, np.ones(change.shape, bool), SPACING)
    # 80 % of the ramp; voxels of 1 mm and rings of half a mm blur it.
    assert width == pytest.approx(0.8 * ramp_mm, abs=0.6)


def test_a_blurred_ball_has_the_width_of_its_blur():
    from scipy import ndimage, special

    distance, sigma = ball(14.0), 1.5
    change = -50.0 * ndimage.gaussian_filter((distance < 0).astype(float), sigma)
    width = quality.edge_width_mm(change, distance < 0, np.ones(change.shape, bool), SPACING)
    expected = 2 * sigma * np.sqrt(2) * special.erfinv(0.8)  # 10-90 % of a normal distribution: 3.84 mm
    assert width == pytest.approx(expected, abs=0.5)


def test_a_step_is_sharper_than_a_real_edge():
    distance = ball(14.0)
    width = quality.edge_width_mm(np.where(distance < 0, -50.0, 0.0), distance < 0, np.ones(distance.shape, bool), SPACING)
    assert width < 1.0, "a pasted block must fail the bound of 1 mm"


def test_edges_that_cannot_be_measured_are_not():
    distance = ball(14.0)
    everywhere = np.ones(distance.shape, bool)
    weak = np.where(distance < 0, 10.0, 0.0)
    assert quality.edge_width_mm(weak, distance < 0, everywhere, SPACING) is None
    texture = np.random.default_rng(1).normal(0, 12, distance.shape)
    blotchy = np.where(distance < 0, 20 + texture, 0.0)
    assert quality.edge_width_mm(blotchy, distance < 0, everywhere, SPACING) is None
    tiny = ball(2.0)
    assert quality.edge_width_mm(np.where(tiny < 0, 50.0, 0.0), tiny < 0, everywhere, SPACING) is None


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.4])
def test_known_noise_has_its_ratio(ratio):
    distance = ball(12.0)
    lesion, ring = distance < 0, (distance > 2) & (distance < 12)
    noise = np.random.default_rng(2).normal(0, 10, distance.shape)
    image = np.where(lesion, -60 + ratio * noise, noise).round().astype(np.int32)
    assert quality.noise_ratio(image, lesion, ring) == pytest.approx(ratio, rel=0.06)
    # A slow gradient, a contrast or a stone is no noise.
    image = image + np.indices(image.shape)[0] // 4
    image[20:22, 22:24, 22:24] = 900
    assert quality.noise_ratio(image, lesion, ring) == pytest.approx(ratio, rel=0.1)


def test_thin_rings_give_no_ratio():
    distance = ball(12.0)
    assert quality.noise_ratio(distance, distance < 0, (distance > 2) & (distance < 3)) is None


def test_place_follows_the_affine_and_accepts_both_neighbours_of_a_tie():
    data = np.zeros((10, 12, 14), np.uint8)
    data[4:8, 3:9, 2:10] = 5
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = [-30.0, 7.0, 100.0]
    labels = SimpleNamespace(affine=affine, dataobj=data)
    mask = np.zeros((20, 20, 20), bool)
    mask[10, 10, 8:12] = True
    to_ras = np.zeros((4, 4))
    to_ras[[0, 1, 2], [2, 1, 0]] = 1.5  # z, y, x voxels of 1.5 mm along S, A, R
    to_ras[3, 3] = 1.0
    to_ras[:3, 3] = [-30.0, 7.0, 100.0]
    # x 8, 9, 10, 11 are 4, 4.5, 5, 5.5 of the file's voxels; y and z are its 5.
    assert quality.inside_organ(mask, to_ras, labels, {5}) == 1.0
    assert quality.inside_organ(mask, to_ras, labels, {6}) == 0.0
    moved = to_ras.copy()
    moved[0, 3] -= 4.5  # 2.5, 3, 3.5 (a tie with the organ), 4
    assert quality.inside_organ(mask, moved, labels, {5}) == 0.5
    moved[0, 3] -= 300.0  # outside the file
    assert quality.inside_organ(mask, moved, labels, {5}) == 0.0


def lesion_patch(elsewhere=0):
    distance = ball(12.0)
    noise = np.random.default_rng(3).normal(0, 10, distance.shape)
    source = (50 + noise).round().astype(np.int16)
    soft = (np.clip(0.5 - distance / 4.0, 0, 1) * 255).round().astype(np.uint8)
    image = (source - 40.0 * (soft / 255.0)).round().astype(np.int16)
    image[0, 0, :elsewhere] += 1
    label = np.where(soft >= 128, 2, 1).astype(np.uint8)
    lesion = SimpleNamespace(requested_hu=-40.0, realised_hu=-38.0)
    to_ras = np.zeros((4, 4))
    to_ras[[0, 1, 2, 3], [2, 1, 0, 3]] = 1.0
    meta = SimpleNamespace(outcome="accepted", attempts=2, organ="liver", affine=to_ras, lesions=[lesion])
    return {"meta": meta, "image": image, "source": source, "soft_mask": soft, "label": label}


def test_a_patch_adds_up():
    organ = quality.Organ()
    ids = {"liver": 1, "liver_tumour": 2}
    for elsewhere in (0, 3):
        quality.measure(organ, lesion_patch(elsewhere), ids, None, set())
    summary = organ.summary()
    assert (summary["patches"], summary["changed"], summary["attempts"]) == (2, 2, 4)
    assert summary["accepted_share_of_attempts"] == 0.5
    assert summary["voxels_changed_elsewhere"] == 3
    assert summary["edge_10_90_mm"]["median"] == pytest.approx(3.2, abs=0.5)
    assert summary["noise_inside_over_ring"]["median"] == pytest.approx(1.0, abs=0.1)
    assert summary["realised_minus_requested_hu"]["median"] == 2.0
    assert summary["lesion_voxels_inside_organ"] is None


def test_the_picture_is_upright_and_a_valid_png(tmp_path):
    patch = lesion_patch()
    patch["source"][:, 39:42, 39:42] = 3000  # anterior and right of the middle
    row = quality.panel(patch, 2, (-100.0, 160.0), zoom=2)
    assert row.shape == (96, 3 * 96 + 4, 3)
    y, x = np.argwhere(row[:, :96, 0] > 230).mean(axis=0)
    assert y < 48 and x < 48, "anterior is on top, the patient's right on the viewer's left"
    quality.write_png(tmp_path / "p.png", row)
    data = (tmp_path / "p.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (3 * 96 + 4, 96)
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    lines = zlib.decompress(data[start + 4 : start + 4 + length])
    assert lines[1 : 1 + row.shape[1] * 3] == row[0].tobytes()
