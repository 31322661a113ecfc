"""What a user sets for the trainer, by environment variables: nnU-Net's command line has no place for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast


class SettingsError(ValueError):
    """An environment variable that is missing or has no meaning; the message names it."""


@dataclass(frozen=True)
class Settings:
    """How the stream takes part in a training.

    Attributes:
        url: the server (``FREETUMOR_URL``).
        ratio: share of streamed patches among all, 0 to 1 (``FREETUMOR_RATIO``, 0.5).
        recipe: what differs from the server's recipe (``FREETUMOR_RECIPE``: JSON or a file's name).
        seed: of everything random in a batch (``FREETUMOR_SEED``, 0).
        case_id: the store's name of nnU-Net's case ``{case}`` (``FREETUMOR_CASE_ID``, ``{case}``).
        allow_absent: whether validation cases may be missing from the store (``FREETUMOR_ABSENT_CASES=allow``).
        labels: stream class to nnU-Net label or id, beside those of the same name (``FREETUMOR_LABELS``: JSON).
        api_key: the server's key (``FREETUMOR_API_KEY``).
        patience: seconds that an outage of the server may last (``FREETUMOR_PATIENCE_SECONDS``, 300).
        codec: ``raw`` or ``zstd`` (``FREETUMOR_CODEC``, ``raw``).
        hosts: what the store ingested: ``scans``, or the ``preprocessed`` cases that ``freetumor-client nnunet-export`` wrote
            (``FREETUMOR_HOSTS``, ``scans``).
    """

    url: str
    ratio: float = 0.5
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    case_id: str = "{case}"
    allow_absent: bool = False
    labels: Mapping[str, str | int] = field(default_factory=dict[str, "str | int"])
    api_key: str | None = field(default=None, repr=False)
    patience: float = 300.0
    codec: str = "raw"
    hosts: str = "scans"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Reads the environment.

        Raises:
            SettingsError: names the variable, what was expected and what it holds.
        """
        url = environment.get("FREETUMOR_URL", "")
        if not url:
            raise SettingsError("FREETUMOR_URL: expected the server's address, such as http://127.0.0.1:8080, got nothing")
        ratio = _number(environment, "FREETUMOR_RATIO", 0.5)
        if not 0.001 <= ratio <= 1.0:
            raise SettingsError(f"FREETUMOR_RATIO: expected 0.001 to 1, got {ratio}")
        case_id = environment.get("FREETUMOR_CASE_ID", "{case}")
        if "{case}" not in case_id:
            raise SettingsError(f"FREETUMOR_CASE_ID: expected a pattern with {{case}} in it, got {case_id!r}")
        absent = environment.get("FREETUMOR_ABSENT_CASES", "refuse")
        if absent not in ("refuse", "allow"):
            raise SettingsError(f"FREETUMOR_ABSENT_CASES: expected refuse or allow, got {absent!r}")
        hosts = environment.get("FREETUMOR_HOSTS", "scans")
        if hosts not in ("scans", "preprocessed"):
            raise SettingsError(f"FREETUMOR_HOSTS: expected scans or preprocessed, got {hosts!r}")
        return cls(
            url=url,
            ratio=ratio,
            recipe=_object(environment, "FREETUMOR_RECIPE"),
            seed=int(_number(environment, "FREETUMOR_SEED", 0)),
            case_id=case_id,
            allow_absent=absent == "allow",
            labels=_object(environment, "FREETUMOR_LABELS"),
            api_key=environment.get("FREETUMOR_API_KEY"),
            patience=_number(environment, "FREETUMOR_PATIENCE_SECONDS", 300.0),
            codec=environment.get("FREETUMOR_CODEC", "raw"),
            hosts=hosts,
        )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    try:
        return default if text is None else float(text)
    except ValueError as error:
        raise SettingsError(f"{name}: expected a number, got {text!r}") from error


def _object(environment: Mapping[str, str], name: str) -> dict[str, Any]:
    text = environment.get(name, "{}")
    try:
        value: Any = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name}: expected a JSON object or the name of a file with one: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{name}: expected a JSON object, got {text!r:.80}")
    return cast("dict[str, Any]", value)
