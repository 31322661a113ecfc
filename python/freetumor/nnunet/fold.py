"""The fold guard: no validation case may host a streamed patch, nor have trained the models behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..client import resolve
from ..errors import FreeTumorError, ProblemError
from ..reader import is_passing
from .settings import Settings

_HOST_POOLS = ("labelled_host", "unlabelled_host")
#: nnU-Net augments all patches alike, streamed ones included.
_UPRIGHT = {"flip": [0, 0, 0], "rotate90": 0, "intensity": 0}


class LeakError(FreeTumorError):
    """The server cannot promise that the fold's validation cases play no part in the stream."""


def guarded_recipe(
    settings: Settings, validation_cases: Iterable[str], patch: tuple[int, int, int], scan_hashes: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the recipe of a fold, and what it comes to on the server.

    Args:
        settings: the user's.
        validation_cases: nnU-Net's names of the fold's validation cases.
        patch: (z, y, x) in voxels.
        scan_hashes: source hashes of the validation cases' scans, where the store's cases have others.

    Raises:
        LeakError: a validation case is unknown to the store, or one was trained on by the models.
        ProblemError: the recipe is refused for another reason.
    """
    wanted = sorted({settings.case_id.format(case=case) for case in validation_cases})
    recipe: dict[str, Any] = {"augment": _UPRIGHT, **settings.recipe, "patch": list(patch)}
    held_out = _known(settings, recipe, wanted)
    select: Mapping[str, Any] = recipe.get("select", {})
    both = sorted({*select.get("hold_out", []), *held_out})
    hashes = sorted({*select.get("hold_out_hashes", []), *scan_hashes})
    recipe["select"] = {**select, "hold_out": both, "hold_out_hashes": hashes}
    resolved = _resolve(settings, recipe)
    if "pools" not in recipe:
        # Real patches come from nnU-Net's own folder.
        hosts = [pool for pool in _HOST_POOLS if pool in resolved["feasible"]]
        if not hosts:
            raise FreeTumorError(f"the store at {settings.url} has no host: pools {sorted(resolved['feasible'])}")
        recipe["pools"] = {pool: 1.0 for pool in hosts}
        resolved = _resolve(settings, recipe)
    missing = set(held_out) - set(resolved["recipe"]["select"]["hold_out"])
    if missing:
        raise LeakError(f"the server did not take validation cases out of the stream, such as {sorted(missing)[:5]}")
    return recipe, resolved


def check_case(case: str, held_out: frozenset[str]) -> None:
    """Refuses a patch of a validation case, whatever the server promised."""
    if case in held_out:
        raise LeakError(f"the server streamed a patch of validation case {case!r}")


def _known(settings: Settings, recipe: dict[str, Any], wanted: list[str]) -> list[str]:
    """Returns the cases that the store holds, where some may be missing; else all, which the server checks by name."""
    if not settings.allow_absent:
        return wanted
    known: list[str] = []
    for case in wanted:
        try:
            asked = {**recipe, "select": {"cases": [case]}}
            resolve(settings.url, asked, api_key=settings.api_key, patience=settings.patience)
        except ProblemError as error:
            if error.field == "recipe.select.cases":
                continue
            if is_passing(error):
                raise
        # Known, although it alone may not do for a recipe.
        known.append(case)
    return known


def _resolve(settings: Settings, recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return resolve(settings.url, recipe, api_key=settings.api_key, patience=settings.patience)
    except ProblemError as error:
        if error.field != "recipe.select.hold_out":
            raise
        if error.status == 409:
            raise LeakError(
                f"the fold's validation cases trained the models of {settings.url}: {error.detail}; serve models that were "
                "trained on this fold's training cases"
            ) from error
        raise LeakError(
            f"the store at {settings.url} does not know a validation case, so that it cannot leave it out: {error.detail}; "
            "ingest the data set under nnU-Net's case names, or set FREETUMOR_CASE_ID to the store's pattern, or, where "
            "the store holds none of this data set's cases under any name, FREETUMOR_ABSENT_CASES=allow"
        ) from error
