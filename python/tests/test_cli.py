"""The console command against a real server."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from freetumor import cli
from server import Server
from test_promises import ANALYTIC

RECIPE = json.dumps({**ANALYTIC, "pools": {"unlabelled_host": 1}})


def pixels(path: Path) -> np.ndarray:
    """Reads a PNG as the command writes it: 8 bits, RGB, no filter."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    lines = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_peek_draws_a_panel_for_every_patch(server: Server, tmp_path: Path, capsys) -> None:
    out = tmp_path / "peek.png"
    run = ["peek", "--url", server.url, "--recipe", RECIPE, "--patches", "3", "--out", str(out), "--json"]
    assert cli.main(run) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["patches"]) == 3
    picture = pixels(out)
    assert picture.shape == (2 * (48 + 4), 2 * (3 * 48 + 4 + 4), 3)
    panel = picture[:48, : 3 * 48 + 4].astype(int)
    before, after, labelled = panel[:, :48], panel[:, 50:98], panel[:, 100:]
    assert (before != after).any(), "the lesion shows"
    red = labelled[..., 0] - labelled[..., 1] > 40
    assert red.any() and (before != after).any(axis=-1)[red].mean() > 0.9, "the label lies on what changed"


def test_stats_add_up(server: Server, tmp_path: Path, capsys) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(RECIPE)
    assert cli.main(["stats", "--url", server.url, "--recipe", str(file), "--patches", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["patches"] == 8 == sum(report["outcomes"].values()) == report["pools"]["unlabelled_host"]
    assert report["accepted_share_of_hosts"] == round(report["outcomes"].get("accepted", 0) / 8, 3)
    assert report["patches_per_second"] > 0 and report["wait_ms"]["p99"] >= report["wait_ms"]["median"]
    assert cli.main(["bench", "--url", server.url, "--recipe", RECIPE, "--patches", "8"]) == 0
    assert "patches per second: " in capsys.readouterr().out


@pytest.mark.parametrize("recipe, named", [('{"sed": 1}', "recipe.sed"), ("[1]", "")])
def test_refusals_are_one_line_and_an_exit_code(server: Server, capsys, recipe: str, named: str) -> None:
    if named:
        assert cli.main(["stats", "--url", server.url, "--recipe", recipe]) == 1
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    else:
        with pytest.raises((SystemExit, OSError)):
            cli.main(["stats", "--url", server.url, "--recipe", recipe])
