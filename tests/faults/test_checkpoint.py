"""A training that is cut short, by a full disk or a kill: the old state, an error that names the file, and the same end."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from server import BINARY, ROOT, command

#: A training of seconds, saved at every second step.
CONFIG = """
[plan]
spacing_mm = [3.0, 3.0, 3.0]
patch = [48, 48, 48]

[critic]
widths = [8, 16]
steps = 8
voxels_per_step = 32768
checkpoint_every = 2

[critic.held_out]
cases = 1
"""
LIMIT_BYTES = 16 << 10


def fill_the_disk() -> None:
    """Lets no file grow further than a part of the state: the write fails as on a full disk, wherever the disk is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))


def arguments(config: Path, store: Path, out: Path, *more: str) -> list[str]:
    return ["train", "critic", "--config", str(config), "--store", str(store), "--out", str(out), *more]


def test_a_full_disk_leaves_the_last_state_and_costs_no_step(tmp_path: Path) -> None:
    store, config = tmp_path / "store", tmp_path / "config.toml"
    config.write_text(CONFIG)
    command("phantom", "--store", store, "--labelled", 4, "--unlabelled", 1, "--seed", 5)
    whole, filled = tmp_path / "whole", tmp_path / "filled"
    command(*arguments(config, store, whole))

    # The first state is written, then the process dies without warning.
    state = filled / "critic.state.safetensors"
    training = subprocess.Popen([BINARY, *arguments(config, store, filled)], cwd=ROOT, stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline and training.poll() is None
        time.sleep(0.002)
    training.kill()
    training.wait()
    kept = state.read_bytes()
    assert len(kept) > LIMIT_BYTES

    # The disk is full at the next one: an error that names the file, and the old state untouched.
    failed = subprocess.run([BINARY, *arguments(config, store, filled, "--resume")], cwd=ROOT, capture_output=True,
                            text=True, timeout=120, preexec_fn=fill_the_disk, restore_signals=False)
    assert failed.returncode == 1 and state.name in failed.stderr, failed.stderr
    assert state.read_bytes() == kept
    leftovers = {path.name for path in filled.iterdir()} - {path.name for path in whole.iterdir()}
    assert not leftovers, "half a state stays behind"

    # With room again the run goes on, and ends where the other did.
    command(*arguments(config, store, filled, "--resume"))
    for name in ("critic.safetensors", state.name):
        assert (filled / name).read_bytes() == (whole / name).read_bytes(), name


#: Stage 2 on the critic above: steps of a tenth of a second, a state after every third.
STAGE_TWO = """
[synthesizer]
widths = [4, 8]
discriminator_widths = [4, 8]
steps = 24
voxels_per_step = 65536
max_cube = 32
held_out_lesions = 2
checkpoint_every = 3
"""


def kill_after(arguments: list[str], log: Path, draws: random.Random) -> None:
    """Kills a training when it has itself logged some steps, one to six."""
    before, steps, deadline = log.stat().st_ino if log.exists() else None, draws.randint(1, 6), time.monotonic() + 120
    first = None
    training = subprocess.Popen([BINARY, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while training.poll() is None and time.monotonic() < deadline:
            # A resumed run writes a log of its own, which begins with the steps before the state.
            if log.exists() and log.stat().st_ino != before:
                lines = log.read_text().count("\n")
                first = lines if first is None else first
                if lines >= first + steps:
                    break
            time.sleep(draws.uniform(0.001, 0.01))
    finally:
        training.kill()
        ended = training.wait()
    assert ended == -signal.SIGKILL, f"the run had ended before it was killed: {ended}"
    assert time.monotonic() < deadline, "no steps"


@pytest.mark.parametrize("stage", ["critic", "synthesizer"])
def test_a_training_killed_at_random_steps_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, stage: str) -> None:
    store, config, models = tmp_path / "store", tmp_path / "config.toml", tmp_path / "models"
    critic = CONFIG.replace("steps = 8", "steps = 24\nmax_cube = 32").replace("checkpoint_every = 2", "checkpoint_every = 3")
    config.write_text(critic + STAGE_TWO)
    command("phantom", "--store", store, "--labelled", 4, "--unlabelled", 2, "--seed", 5, "--config", config)
    command(*arguments(config, store, models))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        if stage == "synthesizer":
            shutil.copytree(models, out)
        else:
            out.mkdir()
    told = ["train", stage, "--config", str(config), "--store", str(store), "--out"]
    command(*told, str(whole))

    seed = random.randrange(1 << 32)
    print(f"seed of the kills: {seed}")
    draws, log = random.Random(seed), broken / f"{stage}.metrics.jsonl"
    for _ in range(3):
        # Three times up to six of the 24 steps: each run begins after the state of the one before, and is killed while steps are left.
        kill_after([*told, str(broken), "--resume"], log, draws)
    command(*told, str(broken), "--resume")
    for name in {f"{stage}.metrics.jsonl", *(path.name for path in whole.glob("*.safetensors"))}:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), f"{name}, seed {seed}"
