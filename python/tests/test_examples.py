"""Every example runs against a real server and learns; those whose framework is absent are skipped."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nnunet_raw import export
from server import ROOT, Server

EXAMPLES = ROOT / "python" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick(store: Path):
    """A server whose default recipe needs no models."""
    env = {"FREETUMOR__RECIPE__SYNTHESIZER": "analytic", "FREETUMOR__RECIPE__GATE__ENABLED": "false"}
    with Server(store, env=env) as running:
        yield running


def falls(losses: list[float]) -> bool:
    third = len(losses) // 3
    return np.mean(losses[-third:]) < np.mean(losses[:third])


def test_numpy(quick: Server) -> None:
    voxels = example("numpy_loop").run(quick.url, 6)
    assert set(voxels) == {"liver_tumour", "pancreas_tumour", "kidney_tumour"} and sum(voxels.values()) > 0


def test_jax(quick: Server) -> None:
    pytest.importorskip("jax", reason="needs JAX: pip install jax")
    losses = example("jax_train").run(quick.url, 9)
    assert falls(losses), losses


def test_torch_goes_on_from_its_checkpoint(quick: Server, tmp_path: Path) -> None:
    pytest.importorskip("torchdata", reason="needs torch and torchdata: pip install './python[torch]'")
    run = example("torch_train").run
    whole = run(quick.url, 9, workers=0)
    assert [index for index, _ in whole] == list(range(0, 18, 2)) and falls([loss for _, loss in whole])
    part = run(quick.url, 4, workers=2, checkpoint=tmp_path / "c.pt")
    rest = run(quick.url, 5, workers=0, checkpoint=tmp_path / "c.pt")
    assert [index for index, _ in part + rest] == [index for index, _ in whole]
    # The same batches and weights: only the order of float sums in threads differs.
    np.testing.assert_allclose([loss for _, loss in part + rest], [loss for _, loss in whole], rtol=1e-3)


def test_monai_mixes_real_and_streamed(quick: Server, tmp_path: Path) -> None:
    pytest.importorskip("monai", reason="needs MONAI: pip install './python[monai]'")
    pytest.importorskip("nibabel")
    names = export(quick.url, tmp_path / "raw", side=64, cases=2)
    files = [
        {"image": str(tmp_path / f"raw/imagesTr/{name}_0000.nii.gz"), "label": str(tmp_path / f"raw/labelsTr/{name}.nii.gz")}
        for name in names
    ]
    import nibabel

    for file in files:  # the export has nnU-Net's ignore label; this example has the stream's
        image = nibabel.load(file["label"])
        label = np.asarray(image.dataobj)
        nibabel.save(nibabel.Nifti1Image(np.where(label == 7, 255, label).astype(np.uint8), image.affine), file["label"])
    losses = example("monai_train").run(quick.url, files, 12)
    assert falls(losses), losses


def test_lightning_goes_on_from_its_checkpoint(quick: Server, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="needs Lightning: pip install pytorch-lightning")
    pytest.importorskip("torchdata")
    run = example("lightning_train").run
    whole = run(quick.url, 9, str(tmp_path / "whole"))
    assert falls(whole), whole
    part = run(quick.url, 4, str(tmp_path / "part"))
    rest = run(quick.url, 9, str(tmp_path / "rest"), str(tmp_path / "part" / "last.ckpt"))
    np.testing.assert_allclose(part + rest, whole, rtol=1e-3)


def test_examples_print_what_they_did(quick: Server) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "numpy_loop.py", "--url", quick.url, "--batches", "2"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "liver_tumour" in done.stdout, done.stderr


def test_the_readmes_example_runs_as_printed(quick: Server) -> None:
    text = (ROOT / "python" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1).replace("http://127.0.0.1:8080", quick.url)
    seen: list[tuple] = []

    def train(image, label) -> None:
        seen.append((image.shape, label.dtype))

    exec(code, {"train": train})  # noqa: S102: our own text
    assert seen and all(shape[1:] == (1, 48, 48, 48) and dtype == np.uint8 for shape, dtype in seen)


def test_the_wheel_installs_where_there_is_nothing(tmp_path: Path) -> None:
    """Builds the wheel and imports it from an empty environment with its declared dependencies."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT / "python"], check=True, timeout=300)
    wheel = next(tmp_path.glob("freetumor-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", wheel], check=True, timeout=600)
    code = "import freetumor, pathlib; assert pathlib.Path(freetumor.__file__).with_name('py.typed').exists()"
    subprocess.run([tmp_path / "venv/bin/python", "-c", code], check=True, timeout=60, cwd=tmp_path)
    folder = subprocess.run([tmp_path / "venv/bin/freetumor-client", "nnunet"], check=True, timeout=60, cwd=tmp_path,
                            capture_output=True, text=True).stdout.strip()
    assert (Path(folder) / "nnUNetTrainerFreeTumor.py").exists()
