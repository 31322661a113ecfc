"""nnU-Net itself, trained with its own commands from a live server; a phantom data set, seconds on a CPU."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="needs nnU-Net: pip install './python[nnunet]'")
nibabel = pytest.importorskip("nibabel")

import freetumor  # noqa: E402
from freetumor.nnunet import TRAINERS  # noqa: E402
from freetumor.nnunet.geometry import Axes, LabelMap  # noqa: E402
from freetumor.source_hash import source_hash  # noqa: E402
from nnunet_raw import export, real_recipe, shrink  # noqa: E402
from server import Server, command  # noqa: E402

SIDE = 64
EPOCHS = 3
RECIPE = {"synthesizer": "analytic", "gate": {"enabled": False}}
#: Three epochs of six steps; one pass over the validation cases instead of eight mirrored ones.
TINY = f"""
import zlib
import torch
from freetumor.nnunet.trainer import nnUNetTrainerFreeTumor

class nnUNetTrainerFreeTumorTiny(nnUNetTrainerFreeTumor):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {EPOCHS}, 6, 2
        self.save_every = 1

    def train_step(self, batch):
        self.print_to_log_file("batch", zlib.crc32(batch["data"].numpy().tobytes()))
        return super().train_step(batch)

    def perform_actual_validation(self, save_probabilities=False):
        self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)
"""


@dataclass
class Lab:
    """nnU-Net's folders with a planned and preprocessed data set, and the store that it came from."""

    root: Path
    store: Path
    cases: list[str]

    def environment(self, url: str, **more: str) -> dict[str, str]:
        return {
            **os.environ, "nnUNet_raw": str(self.root / "raw"), "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.root / "results"), "nnUNet_extTrainer": f"{self.root / 'trainers'}{os.pathsep}{TRAINERS}",
            "nnUNet_n_proc_DA": "2", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
            "FREETUMOR_URL": url, "FREETUMOR_RECIPE": json.dumps(RECIPE), **more,
        }

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / "Dataset901_Phantom"

    def logs(self, configuration: str) -> str:
        """Returns what all trainings of a configuration logged."""
        folder = self.root / "results" / "Dataset901_Phantom"
        files = folder.glob(f"nnUNetTrainerFreeTumorTiny__nnUNetPlans__{configuration}/fold_0/training_log_*.txt")
        return "".join(file.read_text() for file in sorted(files, key=lambda file: file.stat().st_mtime))

    def forget(self, configuration: str) -> None:
        """Moves the results away."""
        folder = self.root / "results"
        folder.rename(self.root / f"results-{configuration}-{time.monotonic_ns()}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("nnunet")
    store = root / "store"
    command("phantom", "--store", store, "--labelled", 6, "--unlabelled", 2, "--seed", 5)
    with Server(store) as server:
        cases = export(server.url, root / "raw" / "Dataset901_Phantom", side=SIDE, cases=6)
    made = Lab(root, store, cases)
    (root / "trainers").mkdir()
    (root / "trainers" / "nnUNetTrainerFreeTumorTiny.py").write_text(TINY)
    run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "2d", "-np", "1", "-npfp", "1",
        environment=made.environment(""))
    for configuration, patch in [("3d_fullres", [32] * 3), ("2d", [32] * 2)]:
        shrink(made.preprocessed / "nnUNetPlans.json", configuration, patch)
    return made


def run(program: str, *arguments: str, environment: dict[str, str], timeout: float = 400) -> str:
    """Runs a command of the environment that the tests run in; returns what it printed."""
    path = Path(sys.executable).parent / program
    done = subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def train_arguments(configuration: str, *more: str) -> list[str]:
    return ["901", configuration, "0", "-tr", "nnUNetTrainerFreeTumorTiny", "-device", "cpu", *more]


def epochs_of(log: str) -> dict[int, tuple[list[int], float, list[int]]]:
    """Returns for each epoch the stream's patches, the training loss and the batches' checksums; later runs replace earlier ones."""
    found: dict[int, tuple[list[int], float, list[int]]] = {}
    epoch, patches, batches = -1, [], []
    for line in log.splitlines():
        if match := re.search(r": Epoch (\d+)", line):
            epoch, batches = int(match.group(1)), []
        elif match := re.search(r": batch (\d+)", line):
            batches.append(int(match.group(1)))
        elif match := re.search(r"FreeTumor: \d+ of \d+ samples were streamed, patches (\[.*\])", line):
            patches = ast.literal_eval(match.group(1))
        elif match := re.search(r"train_loss (\S+)", line):
            found[epoch] = (patches, float(match.group(1)), batches)
    return found


def test_3d_trains_and_a_killed_training_goes_on_with_the_same_batches(lab: Lab) -> None:
    with Server(lab.store) as server:
        run("nnUNetv2_train", *train_arguments("3d_fullres"), environment=lab.environment(server.url))
        whole = epochs_of(lab.logs("3d_fullres"))
        summary = next((lab.root / "results").rglob("validation/summary.json"))
        assert "Dice" in summary.read_text(), "nnU-Net validated"
        lab.forget("3d_fullres")

        path = Path(sys.executable).parent / "nnUNetv2_train"
        killed = subprocess.Popen([path, *train_arguments("3d_fullres")], env=lab.environment(server.url),
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 200
        while ": Epoch 1" not in lab.logs("3d_fullres"):
            assert time.monotonic() < deadline and killed.poll() is None
            time.sleep(0.2)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        # Another number of workers: one that makes every step instead of two that take turns.
        environment = lab.environment(server.url, nnUNet_n_proc_DA="1")
        run("nnUNetv2_train", *train_arguments("3d_fullres", "--c"), environment=environment)
        resumed = epochs_of(lab.logs("3d_fullres"))
    assert sorted(whole) == list(range(EPOCHS))
    # Half of 12 samples in each epoch.
    assert [patches for patches, *_ in whole.values()] == [list(range(6 * epoch, 6 * epoch + 6)) for epoch in range(EPOCHS)]
    losses = [loss for _, loss, _ in whole.values()]
    assert losses[-1] < losses[0] - 0.2, losses
    # Not the losses: nnU-Net draws its first weights anew. The batches: streamed and real patches, crops and augmentation.
    for epoch, (patches, _, batches) in whole.items():
        assert len(batches) == 6 and (resumed[epoch][0], resumed[epoch][2]) == (patches, batches)


def test_2d_trains_from_a_quarter_of_streamed_slices(lab: Lab) -> None:
    with Server(lab.store) as server:
        environment = lab.environment(server.url, FREETUMOR_RATIO="0.25", nnUNet_n_proc_DA="0")
        run("nnUNetv2_train", *train_arguments("2d"), environment=environment)
    epochs = epochs_of(lab.logs("2d"))
    assert [patches for patches, *_ in epochs.values()] == [list(range(3 * epoch, 3 * epoch + 3)) for epoch in range(EPOCHS)]
    assert epochs[EPOCHS - 1][1] < epochs[0][1]


def test_a_fold_that_the_server_cannot_leave_out_does_not_start(lab: Lab) -> None:
    with Server(lab.store) as server:
        environment = lab.environment(server.url, FREETUMOR_CASE_ID="other-{case}")
        path = Path(sys.executable).parent / "nnUNetv2_train"
        arguments = [path, "901", "3d_fullres", "1", "-tr", "nnUNetTrainerFreeTumor", "-device", "cpu"]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "LeakError" in done.stderr and "does not know a validation case" in done.stderr
    assert "Epoch 0" not in done.stdout


def test_a_streamed_patch_is_what_nnunet_makes_of_the_same_voxels(lab: Lab) -> None:
    """A real patch from the stream and the same voxels from nnU-Net's preprocessed folder are equal."""
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    plans = json.loads((lab.preprocessed / "nnUNetPlans.json").read_text())
    dataset_json = json.loads((lab.preprocessed / "dataset.json").read_text())
    dataset = nnUNetDatasetBlosc2(str(lab.preprocessed / "nnUNetPlans_3d_fullres"))
    compared = set()
    with Server(lab.store) as server, freetumor.stream(server.url, real_recipe(SIDE), batch_size=1, image="i16") as stream:
        labels = LabelMap(stream.header.labels, dataset_json["labels"], {}, dataset_json["labels"]["ignore"])
        for batch in stream:
            meta = batch.meta[0]
            if meta.case in compared:
                continue
            image, seg, _, properties = dataset.load_case(meta.case)
            axes = Axes.of_case(properties, plans["transpose_forward"])
            normalize = CTNormalization(False, plans["foreground_intensity_properties_per_channel"]["0"])
            box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
            streamed = normalize.run(axes.turn(batch.image[0, 0]).astype(np.float32))[box]
            np.testing.assert_allclose(streamed, image[0], rtol=0, atol=1e-5)  # one rounding of f32 in between
            mapped = axes.turn(labels.apply(batch.label[0, 0], meta))[box]
            np.testing.assert_array_equal(mapped, np.maximum(seg[0], 0))  # -1: outside the body, background to the loss
            compared.add(meta.case)
            if len(compared) == len(lab.cases):
                break
    assert sorted(compared) == lab.cases


def test_hosts_that_nnunet_preprocessed_are_its_own_voxels(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, ingested and streamed, nnU-Net's resampled cases come back rounded to whole HU, wherever the patch lies."""
    from freetumor.nnunet.normalization import Normalization
    from freetumor.nnunet.preprocessed import scan_hashes
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    plans_name, coarse_mm = "nnUNetPlansCoarse", ["2.5", "2.25", "2.0"]
    environment = lab.environment("")
    run("nnUNetv2_plan_experiment", "-d", "901", "-overwrite_target_spacing", *coarse_mm, "-overwrite_plans_name", plans_name,
        environment=environment)
    run("nnUNetv2_preprocess", "-d", "901", "-plans_name", plans_name, "-c", "3d_fullres", "-np", "1", environment=environment)
    said = run("freetumor-client", "nnunet-export", "901", "--plans", plans_name, "--out", str(tmp_path / "exported"),
               environment=environment)
    assert f"{len(lab.cases)} cases" in said
    plans_file = lab.preprocessed / f"{plans_name}.json"
    command("ingest", "--plan", plans_file, "--datalist", tmp_path / "exported" / "dataset.json", "--preset",
            tmp_path / "exported" / "preset.toml", "--store", tmp_path / "store")

    plans = json.loads(plans_file.read_text())
    ids = json.loads((lab.preprocessed / "dataset.json").read_text())["labels"]
    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    dataset = nnUNetDatasetBlosc2(str(lab.preprocessed / f"{plans_name}_3d_fullres"))
    normalization = Normalization(intensities, True)
    compared = set()
    with Server(tmp_path / "store") as server:
        with freetumor.stream(server.url, real_recipe(48), batch_size=1, image="i16", count=40) as stream:
            labels = LabelMap(stream.header.labels, ids, {}, ids["ignore"])
            for batch in stream:
                meta = batch.meta[0]
                image, seg, _, properties = dataset.load_case(meta.case)
                axes = Axes.of_case(properties, plans["transpose_forward"])
                shape = np.array(axes.streamed(image.shape[1:])).astype(int)
                start = np.array(meta.region_start)
                inside = np.maximum(start, 0), np.minimum(start + 48, shape)
                in_case, in_patch = (tuple(map(slice, *(edge - shift for edge in inside))) for shift in (0, start))
                normalized = normalization.run(batch.image[0, 0])
                beyond = np.ones_like(normalized, dtype=bool)
                beyond[in_patch] = False
                assert (normalized[beyond] == 0).all(), "as nnU-Net pads"
                whole = np.full(shape, np.nan, dtype=np.float32)
                whole[in_case] = normalized[in_patch]
                held, streamed = np.asarray(image[0]), axes.turn(whole)
                is_here = np.isfinite(streamed)
                # Half an HU of rounding, and what single precision makes of it.
                np.testing.assert_allclose(streamed[is_here], held[is_here], rtol=0, atol=0.501 / intensities["std"])
                classes = np.zeros(shape, dtype=np.int16)
                classes[in_case] = labels.apply(batch.label[0, 0], meta)[in_patch]
                np.testing.assert_array_equal(axes.turn(classes)[is_here], np.maximum(np.asarray(seg[0]), 0)[is_here])
                compared.add(meta.case)
    assert sorted(compared) == lab.cases
    # Models that were trained on a validation scan itself are found by its hash, which the exported case does not have.
    path = lab.root / "raw" / "Dataset901_Phantom" / "imagesTr" / f"{lab.cases[0]}_0000.nii.gz"
    scan = nibabel.load(path)
    monkeypatch.setattr("nnunetv2.paths.nnUNet_raw", str(lab.root / "raw"))
    assert scan_hashes("Dataset901_Phantom", lab.cases[:1]) == [source_hash(scan.get_fdata(), scan.affine)]


@pytest.mark.parametrize("order, backwards", [((0, 1, 2), (0, 1, 1)), ((2, 0, 1), (1, 0, 0)), ((1, 2, 0), (0, 0, 1))])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_files_of_any_orientation_meet_the_streams_axes(tmp_path: Path, order, backwards, reader) -> None:
    from nnunetv2.imageio import nibabel_reader_writer, simpleitk_reader_writer

    patch = np.random.default_rng(3).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)  # (z, y, x) of S, A, R
    to_ras = np.array([[0, 0, 3.0, -9.0], [0, 2.0, 0, 4.0], [1.0, 0, 0, 70.0], [0, 0, 0, 1]])
    axes = Axes(order, tuple(bool(back) for back in backwards))
    array = axes.turn(patch)  # what a reader returns: (k, j, i) of the file
    directions = np.zeros((3, 3))
    for array_axis, (axis, back) in enumerate(zip(order, backwards)):
        directions[:, 2 - array_axis] = to_ras[:3, axis] * (-1 if back else 1)
    affine = np.eye(4)
    affine[:3, :3] = directions
    file = tmp_path / "case_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine), file)
    module = simpleitk_reader_writer if reader == "SimpleITKIO" else nibabel_reader_writer
    read, properties = getattr(module, reader)().read_images([str(file)])
    for transpose in ([0, 1, 2], [2, 0, 1]):
        found = Axes.of_case(properties, transpose)
        np.testing.assert_array_equal(found.turn(patch), read[0].transpose(transpose))
