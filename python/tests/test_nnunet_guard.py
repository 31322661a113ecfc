"""What the nnU-Net trainer decides without nnU-Net: the fold guard, settings, labels, the mix. Against the real server."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import freetumor
from freetumor.nnunet.feed import Feed, Mix
from freetumor.nnunet.fold import LeakError, check_case, guarded_recipe
from freetumor.nnunet.geometry import Axes, LabelMap, check_spacing, patch_for
from freetumor.nnunet.settings import Settings, SettingsError
from server import MODELS, Server, command
from test_promises import ANALYTIC, TRAINED_SEED

PATCH = (48, 48, 48)


def cases_of(store: Path) -> list[str]:
    return sorted(path.stem for path in (store / "cases").iterdir())


def test_validation_cases_never_host_a_patch(server: Server, store: Path) -> None:
    labelled = [case for case in cases_of(store) if "unlabelled" not in case]
    settings = Settings(url=server.url, recipe={"synthesizer": "analytic", "gate": {"enabled": False}})
    recipe, resolved = guarded_recipe(settings, labelled[:1], PATCH)
    assert resolved["recipe"]["select"]["hold_out"] == labelled[:1]
    assert "labelled_real" not in recipe["pools"], "real patches come from nnU-Net's folder"
    assert recipe["augment"]["flip"] == [0, 0, 0] and tuple(resolved["patch"]) == PATCH
    seen = {meta.case for batch in freetumor.stream(server.url, recipe, count=20) for meta in batch.meta}
    assert seen and not seen & set(labelled[:1])
    with pytest.raises(LeakError, match=labelled[0]):
        check_case(labelled[0], frozenset(labelled[:1]))
    # Scans of other hashes than the store's, such as those that exported cases were made of.
    hashes = ["ab" * 32, "cd" * 32]
    recipe, resolved = guarded_recipe(settings, labelled[:1], PATCH, hashes)
    assert resolved["recipe"]["select"]["hold_out_hashes"] == hashes


def test_a_case_that_the_store_does_not_know_stops_the_training(server: Server, store: Path) -> None:
    settings = Settings(url=server.url, recipe=ANALYTIC)
    with pytest.raises(LeakError, match="liver_007.*FREETUMOR_CASE_ID"):
        guarded_recipe(settings, ["liver_007"], PATCH)
    known = cases_of(store)[0]
    number = known.rsplit("-", 1)[1]
    renamed = Settings(url=server.url, recipe=ANALYTIC, case_id=known.replace(number, "{case}"))
    assert guarded_recipe(renamed, [number], PATCH)[0]["select"]["hold_out"] == [known]
    elsewhere = Settings(url=server.url, recipe=ANALYTIC, allow_absent=True)
    assert guarded_recipe(elsewhere, ["liver_007", known], PATCH)[0]["select"]["hold_out"] == [known]


def test_models_that_saw_a_validation_case_stop_the_training(tmp_path: Path) -> None:
    trained = tmp_path / "store"
    command("phantom", "--store", trained, "--labelled", 2, "--unlabelled", 2, "--seed", TRAINED_SEED)
    manifests = [json.loads(path.read_text()) for path in MODELS.glob("*.json") if "report" not in path.name]
    seen = {case for manifest in manifests for case in manifest["training"]["case_ids"]}
    case = next(case for case in cases_of(trained) if case in seen)
    with Server(trained) as server:
        with pytest.raises(LeakError, match=f"trained the models.*{case}"):
            guarded_recipe(Settings(url=server.url), [case], PATCH)


def test_settings_name_the_variable() -> None:
    read = Settings.from_environment
    settings = read({"FREETUMOR_URL": "http://a", "FREETUMOR_RATIO": "0.25", "FREETUMOR_RECIPE": '{"seed": 3}'})
    assert (settings.ratio, settings.recipe, settings.patience) == (0.25, {"seed": 3}, 300.0)
    assert "s3cret" not in repr(read({"FREETUMOR_URL": "http://a", "FREETUMOR_API_KEY": "s3cret"}))
    wrong = [
        ({}, "FREETUMOR_URL"), ({"FREETUMOR_RATIO": "0.0005"}, "FREETUMOR_RATIO"), ({"FREETUMOR_RATIO": "x"}, "FREETUMOR_RATIO"),
        ({"FREETUMOR_RECIPE": "[]"}, "FREETUMOR_RECIPE"), ({"FREETUMOR_CASE_ID": "a"}, "FREETUMOR_CASE_ID"),
        ({"FREETUMOR_ABSENT_CASES": "yes"}, "FREETUMOR_ABSENT_CASES"), ({"FREETUMOR_LABELS": "{"}, "FREETUMOR_LABELS"),
    ]
    for environment, name in wrong:
        with pytest.raises(SettingsError, match=name):
            read({**({"FREETUMOR_URL": "http://a"} if name != "FREETUMOR_URL" else {}), **environment})


def test_labels_become_the_data_sets_and_255_its_ignore() -> None:
    stream = {"background": 0, "liver": 1, "liver_tumour": 2, "pancreas": 3, "pancreas_tumour": 4}
    meta = SimpleNamespace(index=7, case="c")
    label = np.array([0, 1, 2, 3, 4, 255], np.uint8)
    lits = {"background": 0, "liver": 1, "tumor": 2, "ignore": 3}
    labels = LabelMap(stream, lits, {"liver_tumour": "tumor"}, 3)
    assert labels.apply(label, meta).tolist() == [0, 1, 2, 0, 0, 3] and labels.tumours == {2}
    regions = LabelMap(stream, {"background": 0, "liver": [1, 2], "tumor": 2}, {"liver": 1, "liver_tumour": "tumor"}, None)
    assert regions.apply(label[:3], meta).tolist() == [0, 1, 2]
    with pytest.raises(freetumor.FreeTumorError, match='patch 7 of case \'c\'.*"ignore"'):
        regions.apply(label, meta)
    with pytest.raises(freetumor.FreeTumorError, match="region.*FREETUMOR_LABELS"):
        LabelMap(stream, {"background": 0, "liver": [1, 2], "liver_tumour": 2}, {}, None)
    with pytest.raises(freetumor.FreeTumorError, match="no tumour"):
        LabelMap(stream, {"background": 0, "liver": 1}, {}, None)
    with pytest.raises(freetumor.FreeTumorError, match="FREETUMOR_LABELS"):
        LabelMap(stream, lits, {"liver_tumour": "lesion"}, None)


def test_other_grids_are_refused_with_the_one_that_fits() -> None:
    turned = Axes((2, 0, 1), (False, False, False))  # nnU-Net's axes run along x, z, y
    check_spacing((1.0, 2.0, 3.0), [3.0, 1.0, 2.0], turned)
    check_spacing((1.0, 2.0, 3.0), [1.0, 2.0], turned)
    with pytest.raises(freetumor.FreeTumorError, match=r"plan.spacing_mm = \[5.0, 2.0, 3.0\]"):
        check_spacing((1.0, 2.0, 3.0), [3.0, 5.0, 2.0], turned)
    assert patch_for((1, 50, 64), turned) == (56, 64, 16)


@pytest.mark.parametrize("ratio, batch_size", [(0.5, 2), (0.25, 2), (1 / 3, 4), (1.0, 2), (0.07, 3)])
def test_the_mix_keeps_its_ratio_and_its_place(ratio: float, batch_size: int) -> None:
    mix = Mix.of(ratio, batch_size)
    expected = 0
    for step in range(300):
        ordinals = mix.streamed(step)
        assert ordinals.start == expected and len(ordinals) == sum(mix.is_streamed(step))
        expected = ordinals.stop
        assert abs(expected - ratio * (step + 1) * batch_size) < 1
    assert expected == mix.before(300 * batch_size)


def test_the_feed_gives_each_worker_its_steps_and_tells_what_went_wrong(server: Server) -> None:
    mix = Mix.of(0.5, 3)
    opened = lambda: freetumor.stream(server.url, ANALYTIC, batch_size=1, image="i16", start=mix.before(12), count=1000)  # noqa: E731
    feed = Feed(opened, mix, 4, queue.Queue, 2, lambda meta: check_case(meta.case, frozenset()))
    feed.start()
    got = [[patch.meta.index for patch in feed.queues[step % 2].get(timeout=60)] for step in range(6)]
    feed.stop()
    assert got == [list(mix.streamed(4 + step)) for step in range(6)]
    first = next(freetumor.stream(server.url, ANALYTIC)).meta[0].case
    leaking = Feed(opened, mix, 4, queue.Queue, 1, lambda meta: check_case(meta.case, frozenset({meta.case, first})))
    leaking.start()
    assert leaking.queues[0].get(timeout=60) is None
    assert isinstance(leaking.error, LeakError)
    leaking.stop()
