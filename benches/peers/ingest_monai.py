"""Prepares the same seven CTs with FreeTumor's ingest and with MONAI, two threads each, in turns, and compares voxels.

    python ingest_monai.py FREETUMOR_BINARY FOLDER_OF_CTS

Needs monai, torch, nibabel and psutil. FOLDER_OF_CTS holds `crlm/crlm_ct_1006.nii.gz` and
`totalsegmentator/example_ct*.nii.gz`; they are copied under other names until there are seven. MONAI's chain is
LoadImage, Orientation(RAS), Spacing(1.5 mm), ScaleIntensityRange, CropForeground, once with two worker processes and once
in one process with two threads of torch. FreeTumor also hashes, checks, analyses organs, compresses and writes.
"""
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import monai.transforms as mt
import numpy as np
import psutil
import torch
from monai.data import DataLoader, Dataset

SPACING = 1.5
ROUNDS = 3
SOURCES = [
    ("crlm/crlm_ct_1006.nii.gz", None),
    ("totalsegmentator/example_ct.nii.gz", None),
    ("totalsegmentator/example_ct_sm.nii.gz", "totalsegmentator/example_seg.nii.gz"),
]
PLAN = "[plan]\nspacing_mm = [1.5, 1.5, 1.5]\npatch = [96, 96, 96]\n"


def watched(run):
    """Returns the peak of the memory of this process's children while run() runs, in MB above the start."""
    me, peak, done = psutil.Process(), [0], threading.Event()

    def total():
        parts = [me, *me.children(recursive=True)]
        bytes_ = 0
        for part in parts:
            try:
                bytes_ += part.memory_full_info().uss
            except psutil.Error:
                pass
        return bytes_

    base = total()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], total() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return peak[0] / 1e6


def measured(runs):
    """Times runs by name in turns, unwatched: asking for memory walks page tables and takes a core away.

    Memory is watched in a run of its own.
    """
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: {"seconds": sorted(seconds[name]), "peak_mb": watched(run)} for name, run in runs.items()}


def chain(keys):
    modes = ["bilinear" if key == "image" else "nearest" for key in keys]
    return mt.Compose([
        mt.LoadImaged(keys, ensure_channel_first=True),
        mt.Orientationd(keys, "RAS"),
        mt.Spacingd(keys, (SPACING,) * 3, mode=modes),
        mt.ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
        mt.CropForegroundd(keys, "image"),
    ])


def prepare(items, workers, torch_threads):
    torch.set_num_threads(torch_threads)
    transforms = {True: chain(["image", "label"]), False: chain(["image"])}
    data = Dataset(items, lambda item: transforms["label" in item](item))
    count = 0
    for _ in DataLoader(data, batch_size=1, num_workers=workers, collate_fn=lambda batch: batch[0]["image"].shape):
        count += 1
    assert count == len(items)


def ingest(binary, folder, items):
    entries = [{"image": i["image"], "id": i["id"], **({"label": i["label"]} if "label" in i else {})} for i in items]
    (folder / "list.json").write_text(json.dumps({"unlabeled": entries}))
    (folder / "plan.toml").write_text(PLAN)
    command = [binary, "ingest", "--config", folder / "plan.toml", "--datalist", folder / "list.json"]
    command += ["--preset", "totalsegmentator", "--store", folder / "store"]
    shutil.rmtree(folder / "store", ignore_errors=True)
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def differences(binary, folder, items):
    """Compares the stored voxels with MONAI's resampling, aligned by the affines; the borders need another rule."""
    export = folder / "export"
    command = [binary, "bench", "store", "--store", folder / "store", "--seconds", "0.05", "--export", export]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found = {}
    for item in items[: len(SOURCES)]:
        keys = ["image", "label"] if "label" in item else ["image"]
        ours = mt.LoadImaged(keys, ensure_channel_first=True)(
            {"image": str(export / f"{item['id']}.nii.gz"), "label": str(export / f"{item['id']}_label.nii.gz")}
        )
        theirs = mt.Compose([mt.LoadImaged(keys, ensure_channel_first=True), mt.Orientationd(keys, "RAS")])(item)
        # Ours is the reference grid: MONAI samples the source at the very positions of our voxels.
        sampled = {}
        for key in keys:
            source = theirs[key]
            if key == "image":
                source = torch.clamp(source, min=-1024)
            to = mt.SpatialResample(mode="bilinear" if key == "image" else "nearest", padding_mode="border")
            sampled[key] = to(source, dst_affine=ours[key].affine, spatial_size=ours[key].shape[1:]).numpy()
        away = np.abs(ours["image"].numpy() - np.round(sampled["image"]))
        result = {"max_hu": float(away.max()), "mean_hu": float(away.mean()), "over_1_hu": float((away > 1).mean())}
        if "label" in keys:
            table = np.zeros(256, int)
            table[[5, 7, 2, 3]] = [1, 3, 5, 5]
            mapped = table[np.round(sampled["label"]).astype(int)]
            result["label_agreement"] = float((mapped == ours["label"].numpy()).mean())
            organ = (mapped > 0) | (ours["label"].numpy() > 0)
            result["label_agreement_in_organs"] = float((mapped == ours["label"].numpy())[organ].mean())
        found[item["id"]] = result
    return found


def main():
    binary, data = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        items = []
        for number in range(7):
            image, label = SOURCES[number % len(SOURCES)]
            item = {"id": f"ct{number}", "image": str(folder / f"ct{number}.nii.gz")}
            shutil.copy(data / image, item["image"])
            if label:
                item["label"] = str(folder / f"ct{number}_label.nii.gz")
                shutil.copy(data / label, item["label"])
            items.append(item)
        result.update(measured({
            "freetumor": lambda: ingest(binary, folder, items),
            "monai_2_workers": lambda: prepare(items, 2, 1),
            "monai_2_torch_threads": lambda: prepare(items, 0, 2),
        }))
        result["differences"] = differences(binary, folder, items)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
