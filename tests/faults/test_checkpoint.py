"""A disk that is full while a training state is written: an error that names the file, the old state, and the same end."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from pathlib import Path

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
