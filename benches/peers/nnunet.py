"""What feeding nnU-Net costs: the stream, nnU-Net's own loader and MONAI's, beside nnU-Net without any loading.

The same network of the same plan trains on the same phantom data set, each way in a process of its own, in turns, several
rounds; medians count. Within a process steps with loading and steps without take turns, and a ratio is of neighbours, so that a
machine that is slower for a minute is slower for both. Without loading means one batch of noise, again and again, as nnU-Net's
`noDataLoading` benchmark trainer does, which needs a GPU; the loader's processes stand still meanwhile.

    freetumor nnUNetTrainerFreeTumor with half of the samples streamed (analytic lesions) from a server that keeps up: another
              client of the same recipe has read them before, so that they lie in its memory
    live      the same, but the server makes them meanwhile, on the same cores
    nnunet    nnU-Net's own loader and augmentation
    monai     a MONAI DataLoader over a CacheDataset of the same files, with transforms like nnU-Net's

The training computes on one thread and each loader has one worker process, so that on two cores the second one has all the
loading, and the server, to do. What that costs is told as seconds of CPU per patch, beyond those of the steps without.

Needs nnU-Net, MONAI and the client (`pip install -e 'python[test-frameworks]'`).

    python benches/peers/nnunet.py --rounds 5 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import operator
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python" / "tests"))

DATASET = "Dataset901_Phantom"
RECIPE = {"synthesizer": "analytic", "gate": {"enabled": False}}
WAYS = ("freetumor", "live", "nnunet", "monai")
#: Patches that the server keeps for a reader that is behind, more than a round takes.
KEPT = 1024
#: Seconds of a tick of /proc/PID/stat.
TICK = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process and of those that it started and that still run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    own = (int(fields[11]) + int(fields[12])) * TICK
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return own + sum(cpu_seconds(child) for child in children)


def reused_patches() -> float:
    """Returns the server's count of patches that it had made for another reader."""
    text = urllib.request.urlopen(os.environ["FREETUMOR_URL"] + "/metrics").read().decode()
    lines = [line.split()[-1] for line in text.splitlines() if line.startswith("freetumor_patches_reused_total")]
    return sum(map(float, lines))


def make_data(root: Path, side: int) -> dict[str, str]:
    """Makes a data set in nnU-Net's raw format out of a phantom, plans and preprocesses it; returns nnU-Net's variables."""
    from nnunet_raw import export, shrink
    from server import Server, command

    from freetumor.nnunet import TRAINERS

    store = root / "store"
    command("phantom", "--store", store, "--labelled", 6, "--unlabelled", 2, "--seed", 5)
    with Server(store) as server:
        export(server.url, root / "raw" / DATASET, side=side + 32, cases=6)
    environment = {
        "nnUNet_raw": str(root / "raw"), "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"), "nnUNet_extTrainer": str(TRAINERS), "nnUNet_n_proc_DA": "1",
        "nnUNet_compile": "f", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "FREETUMOR_RECIPE": json.dumps(RECIPE),
    }
    plan = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    subprocess.run([plan, "-d", "901", "-c", "3d_fullres", "-np", "1", "-npfp", "1"], check=True, capture_output=True,
                   env={**os.environ, **environment})
    shrink(root / "preprocessed" / DATASET / "nnUNetPlans.json", "3d_fullres", [side] * 3)
    return environment


def noise(trainer: Any) -> dict[str, Any]:
    """Returns a batch as the benchmark trainer's."""
    import torch

    patch, labels = trainer.configuration_manager.patch_size, max(trainer.label_manager.all_labels)
    sides = [[int(side * scale) for side, scale in zip(patch, scales)] for scales in trainer._get_deep_supervision_scales()]
    target = [torch.round(torch.rand((trainer.batch_size, 1, *side)) * labels) for side in sides]
    return {"data": torch.rand((trainer.batch_size, 1, *patch)), "target": target}


def monai_batches(trainer: Any) -> Iterator[dict[str, Any]]:
    """Yields batches as nnU-Net's trainer takes them, loaded and augmented by MONAI."""
    import monai.transforms as mt
    import torch
    from monai.data import CacheDataset, DataLoader

    raw = Path(os.environ["nnUNet_raw"]) / DATASET
    files = [{"image": str(raw / "imagesTr" / f"{file.name[:-7]}_0000.nii.gz"), "label": str(file)}
             for file in sorted((raw / "labelsTr").glob("*.nii.gz"))]
    patch, both = tuple(trainer.configuration_manager.patch_size), ("image", "label")
    scales = trainer._get_deep_supervision_scales()
    transforms = mt.Compose([
        mt.LoadImaged(both), mt.EnsureChannelFirstd(both), mt.ScaleIntensityRanged("image", -175, 250, -2, 2, clip=True),
        mt.RandCropByPosNegLabeld(both, "label", patch, pos=1, neg=2, num_samples=1),
        mt.RandRotated(both, 0.5, 0.5, 0.5, prob=0.2, mode=("bilinear", "nearest")),
        mt.RandZoomd(both, prob=0.2, min_zoom=0.7, max_zoom=1.4, mode=("trilinear", "nearest")),
        mt.RandGaussianNoised("image", prob=0.1), mt.RandGaussianSmoothd("image", prob=0.2),
        mt.RandScaleIntensityd("image", 0.25, prob=0.15), mt.RandAdjustContrastd("image", prob=0.15),
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)), mt.ToTensord(both, track_meta=False),
    ])
    loader = DataLoader(CacheDataset(files * 64, transforms, copy_cache=False, cache_num=len(files), progress=False),
                        batch_size=trainer.batch_size, num_workers=1, shuffle=True, persistent_workers=True)
    while True:
        for batch in loader:
            label = batch["label"].float()
            target = [torch.nn.functional.interpolate(label, scale_factor=tuple(scale), mode="nearest") for scale in scales]
            yield {"data": batch["image"].float(), "target": target}


def read_ahead(trainer: Any, patches: int, server_pid: int) -> Iterator[Any]:
    """Reads the trainer's stream ahead of it; the server keeps what it made. Returns the stream, to be kept open."""
    import freetumor

    identity = json.loads((Path(trainer.output_folder) / "freetumor_stream.json").read_text())
    leader = freetumor.stream(os.environ["FREETUMOR_URL"], identity["recipe"], batch_size=1, count=patches + KEPT, image="i16",
                              prefetch=1)
    for _ in range(patches):
        assert next(leader).meta[0].case
    used = -1.0
    while cpu_seconds(server_pid) - used > 0.05:  # it makes a few more, as far as buffers go
        used = cpu_seconds(server_pid)
        time.sleep(1)
    return leader


def taker(way: str, trainer: Any) -> Callable[[], Any]:
    """Returns what gives the next batch."""
    batches = monai_batches(trainer) if way == "monai" else trainer.dataloader_train
    return lambda: next(batches)


def signal_workers(what: signal.Signals) -> None:
    """Stops the loader's processes, so that they neither help nor disturb the ceiling, or lets them go on."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, what)


class Block:
    """Steps of one kind: what they took, waiting apart."""

    def __init__(self, trainer: Any, take: Callable[[], Any], pids: Sequence[int]) -> None:
        self._trainer, self._take, self._pids = trainer, take, pids
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.cpu = [0.0 for _ in pids]

    def run(self, steps: int) -> None:
        cpu, began = [cpu_seconds(pid) for pid in self._pids], time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = self._take()
            self.waits.append(time.perf_counter() - asked)
            self._trainer.train_step(batch)
        self.seconds.append((time.perf_counter() - began) / steps)
        self.cpu = [so_far + cpu_seconds(pid) - before for so_far, pid, before in zip(self.cpu, self._pids, cpu)]


def measure(way: str, options: argparse.Namespace) -> None:
    """Trains with and without loading in turns, and prints what either took."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(1)
    name = "nnUNetTrainerFreeTumor" if way in ("freetumor", "live") else "nnUNetTrainer"
    trainer = get_trainer_from_args("901", "3d_fullres", 0, name, device=torch.device("cpu"))
    if way == "monai":
        trainer.get_dataloaders = lambda: (None, None)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    take, batch, pids = taker(way, trainer), noise(trainer), (os.getpid(), options.server)
    ceiling = Block(trainer, lambda: {**batch, "keys": []}, pids)
    fed = Block(trainer, take, pids)
    for block in (ceiling, fed):
        block.run(options.warm_up)
    steps = options.pairs * options.steps
    leader = read_ahead(trainer, (steps + options.warm_up) * trainer.batch_size, options.server) if way == "freetumor" else None
    fed, reused = Block(trainer, take, pids), reused_patches()
    for pair in range(options.pairs):
        for is_fed in (False, True) if pair % 2 == 0 else (True, False):
            signal_workers(signal.SIGCONT if is_fed else signal.SIGSTOP)
            (fed if is_fed else ceiling).run(options.steps)
    signal_workers(signal.SIGCONT)
    waits, patches = sorted(fed.waits), steps * trainer.batch_size
    print(json.dumps({
        "over_ceiling": statistics.median(map(operator.truediv, fed.seconds, ceiling.seconds[1:])),
        "seconds_per_step": statistics.median(fed.seconds), "ceiling_seconds_per_step": statistics.median(ceiling.seconds[1:]),
        "wait_ms": statistics.median(waits) * 1e3, "wait_p95_ms": waits[int(len(waits) * 0.95)] * 1e3,
        "loading_cpu_per_patch": fed.cpu[0] / patches - ceiling.cpu[0] / (patches + options.warm_up * trainer.batch_size),
        "server_cpu_per_patch": fed.cpu[1] / patches, "reused_per_patch": (reused_patches() - reused) / patches,
    }), flush=True)
    del leader
    for worker in multiprocessing.active_children():
        worker.kill()  # it would hold the pipe open that the line above went into
    os._exit(0)  # threads of loaders end with the process; nothing of the training is kept


def one(way: str, options: argparse.Namespace, environment: dict[str, str], url: str, server_pid: int) -> dict[str, float]:
    """Runs one way once, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, "--server", str(server_pid), "--pairs", str(options.pairs),
         "--steps", str(options.steps), "--warm-up", str(options.warm_up)],
        env={**os.environ, **environment, "FREETUMOR_URL": url}, capture_output=True, text=True, timeout=1800,
    )
    if done.returncode != 0:
        raise SystemExit(f"{way}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    from server import Server

    ways = options.only.split(",") if options.only else list(WAYS)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = make_data(root, options.patch)
        with Server(root / "store", env={"FREETUMOR__STREAM__SHARE_PATCHES": str(KEPT)}) as server:
            for number in range(options.rounds):
                print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
                rounds.append({way: one(way, options, environment, server.url, server.process.pid) for way in ways})
    found: dict[str, dict[str, float]] = {}
    for way in ways:
        ratios = [one[way]["over_ceiling"] for one in rounds]
        found[way] = {key: statistics.median(one[way][key] for one in rounds) for key in rounds[0][way]}
        found[way] |= {"least": min(ratios), "most": max(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=40, help="turns of a round: steps without loading, steps with it")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--patch", type=int, default=48, help="voxels along each side")
    parser.add_argument("--only", default="", help="ways to measure, separated by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--server", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options)
        return
    found = compare(options)
    if options.json:
        print(json.dumps(found))
        return
    for way, got in found.items():
        print(f"{way:>9} {got['seconds_per_step'] * 1e3:7.1f} ms a step, {got['over_ceiling']:.3f} of the ceiling "
              f"({got['least']:.3f} to {got['most']:.3f}), next() {got['wait_ms']:.2f} ms at the median, "
              f"{got['wait_p95_ms']:.2f} at the 95th percentile; CPU s per patch: loading "
              f"{got['loading_cpu_per_patch']:.3f}, server {got['server_cpu_per_patch']:.3f}")


if __name__ == "__main__":
    main()
