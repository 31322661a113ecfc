"""Can a network tell streamed patches from nnU-Net's own by the way they came?

A phantom data set is planned at a coarser spacing, so that nnU-Net resamples it. Two stores are made of it: one ingests the
scans, the other what nnU-Net made of them (`freetumor-client nnunet-export`). Crops without a lesion, of the same places of the
same cases, are taken from nnU-Net's preprocessed arrays and from patches streamed from either store, and a small network
learns to tell the two ways apart on some cases; its area under the ROC curve counts on others. 0.5 is chance. (A store of scans
is cropped to the body, so that its crops are of nearby places only.)

Needs nnU-Net and the client (`pip install -e 'python[test-frameworks]'`).

    python benches/peers/nnunet_paths.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python" / "tests"))

DATASET = "Dataset901_Phantom"
PLANS = "nnUNetPlansCoarse"
COARSE_MM = ["2.5", "2.25", "2.0"]
CASES, PATCH, CROP = 8, 48, 24


def prepare(root: Path) -> dict[str, Path]:
    """Makes data set, plans, preprocessed cases and both stores; returns the stores."""
    from nnunet_raw import export
    from server import Server, command

    source = root / "source"
    command("phantom", "--store", source, "--labelled", CASES, "--unlabelled", 1, "--seed", 5)
    with Server(source) as server:
        export(server.url, root / "raw" / DATASET, side=96, cases=CASES)
    os.environ.update(nnUNet_raw=str(root / "raw"), nnUNet_preprocessed=str(root / "preprocessed"),
                      nnUNet_results=str(root / "results"))

    def run(program: str, *arguments: str) -> None:
        subprocess.run([Path(sys.executable).parent / program, *arguments], check=True, capture_output=True)

    run("nnUNetv2_extract_fingerprint", "-d", "901", "-np", "1")
    run("nnUNetv2_plan_experiment", "-d", "901", "-overwrite_target_spacing", *COARSE_MM, "-overwrite_plans_name", PLANS)
    run("nnUNetv2_preprocess", "-d", "901", "-plans_name", PLANS, "-c", "3d_fullres", "-np", "1")
    run("freetumor-client", "nnunet-export", "901", "--plans", PLANS, "--out", str(root / "exported"))
    raw = root / "raw" / DATASET
    entries = [{"image": f"imagesTr/{file.name[:-7]}_0000.nii.gz", "label": f"labelsTr/{file.name}", "id": file.name[:-7]}
               for file in sorted((raw / "labelsTr").glob("*.nii.gz"))]
    (raw / "datalist.json").write_text(json.dumps({"training": entries}))
    stores = {}
    for name, datalist in [("scans", raw / "datalist.json"), ("preprocessed", root / "exported" / "dataset.json")]:
        stores[name] = root / name
        command("ingest", "--plan", root / "preprocessed" / DATASET / f"{PLANS}.json", "--datalist", datalist, "--preset",
                root / "exported" / "preset.toml", "--store", stores[name])
    return stores


def crops(root: Path, store: Path, is_preprocessed: bool, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns crops as streamed, the same places from nnU-Net's arrays, and the cases that they are of."""
    import freetumor
    from freetumor.nnunet.geometry import Axes
    from freetumor.nnunet.normalization import Normalization
    from nnunet_raw import real_recipe
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from server import Server

    folder = root / "preprocessed" / DATASET
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    dataset = nnUNetDatasetBlosc2(str(folder / f"{PLANS}_3d_fullres"))
    normalization = Normalization(plans["foreground_intensity_properties_per_channel"]["0"], is_preprocessed)
    recipe = {**real_recipe(PATCH), "pools": {"labelled_host": 1}, "patches_per_epoch": count * 20}
    rng = np.random.default_rng(0)
    streamed: list[np.ndarray] = []
    own: list[np.ndarray] = []
    cases: list[str] = []
    with Server(store) as server, freetumor.stream(server.url, recipe, batch_size=1, image="i16", outputs=("soft_mask",)) as stream:
        for batch in stream:
            meta = batch.meta[0]
            image, _, _, properties = dataset.load_case(meta.case)
            axes = Axes.of_case(properties, plans["transpose_forward"])
            start = np.array(meta.region_start)
            shape = np.array(axes.streamed(image.shape[1:])).astype(int)
            at = rng.integers(0, PATCH - CROP + 1, 3)
            box = tuple(slice(low, low + CROP) for low in at)
            low = start + at
            if batch.soft_mask[0, 0][box].any() or (low < 0).any() or (low + CROP > shape).any():
                continue
            # nnU-Net's array, turned to the stream's axes: turning is its own inverse on indices.
            index = axes.turn(np.arange(np.prod(shape)).reshape(shape)).ravel()
            upright = np.empty(shape, dtype=np.float32)
            upright.ravel()[index] = np.asarray(image[0]).ravel()
            own.append(upright[tuple(slice(edge, edge + CROP) for edge in low)])
            streamed.append(normalization.run(batch.image[0, 0])[box])
            cases.append(meta.case)
            if len(cases) == count:
                break
    return np.stack(streamed), np.stack(own), cases


def auc_of(streamed: np.ndarray, own: np.ndarray, cases: list[str], epochs: int, seed: int) -> float:
    """Trains on three quarters of the cases; returns the area under the ROC curve on the others' crops."""
    import torch
    from scipy.stats import rankdata
    from torch import nn

    torch.manual_seed(seed)
    torch.set_num_threads(max(1, os.cpu_count() or 1))
    names = sorted(set(cases))
    held_out = np.isin(cases, names[seed % 4 :: 4])

    def both(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.concatenate([streamed[chosen], own[chosen]])[:, None]
        return torch.from_numpy(data), torch.cat([torch.ones(int(chosen.sum())), torch.zeros(int(chosen.sum()))])

    train, test = both(~held_out), both(held_out)
    layers: list[nn.Module] = []
    for channels, width, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 2)]:
        layers += [nn.Conv3d(channels, width, 3, stride, 1), nn.BatchNorm3d(width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[1])).split(16):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(network(train[0][rows])[:, 0], train[1][rows])
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        scores = torch.cat([network(part)[:, 0] for part in test[0].split(32)]).numpy()
    positive = test[1].numpy() == 1
    ranks, n = rankdata(scores), int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=800, help="of each way")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=4, help="networks, each with other cases held out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, store in prepare(root).items():
            streamed, own, cases = crops(root, store, name == "preprocessed", options.crops)
            aucs = [auc_of(streamed, own, cases, options.epochs, seed) for seed in range(options.seeds)]
            found[name] = {"auc": float(np.mean(aucs)), "each": aucs, "crops": len(cases), "cases": len(set(cases)),
                           "mean_difference": float(np.abs(streamed - own).mean())}
    if options.json:
        print(json.dumps(found))
        return
    for name, one in found.items():
        print(f"store of {name:12} AUC {one['auc']:.3f} ({', '.join(f'{auc:.3f}' for auc in one['each'])}), crops differ by "
              f"{one['mean_difference']:.4f} standard deviations on average, {one['crops']} crops of {one['cases']} cases")


if __name__ == "__main__":
    main()
