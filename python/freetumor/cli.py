"""The console command ``freetumor-client``: look at a stream, count it, measure it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .client import Stream, stream
from .errors import FreeTumorError
from .meta import PatchMeta
from .nnunet import TRAINERS
from .png import write_png
from .tally import Rates, Tally

_ORGAN_COLOUR = (40, 140, 90)
_TUMOUR_COLOUR = (220, 60, 60)
_IGNORE = 255
_GAP_PIXELS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        report: dict[str, Any] | str = options.run(options)
    except FreeTumorError as error:
        print(f"freetumor-client: {error}", file=sys.stderr)
        return 1
    if isinstance(report, str):
        print(report)
    else:
        print(json.dumps(report) if options.json else _readable(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="freetumor-client", description="Looks at what a FreeTumor server streams.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, patches: int, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        sub.add_argument("--url", default="http://127.0.0.1:8080", help="the server [%(default)s]")
        sub.add_argument("--recipe", type=_recipe, help="JSON, or the name of a file with it [the server's]")
        sub.add_argument("--patches", type=int, default=patches, help="how many [%(default)s]")
        sub.add_argument("--start", type=int, default=0, help="the first index [%(default)s]")
        sub.add_argument("--batch-size", type=int, default=2, help="patches in a batch [%(default)s]")
        sub.add_argument("--codec", choices=["raw", "zstd", "zstd_u8"], default="raw", help="compression on the wire [%(default)s]")
        sub.add_argument("--image", choices=["i16", "f16", "f32"], default="i16", help="[%(default)s]")
        sub.add_argument("--api-key", help="the server's key, where it asks for one")
        sub.add_argument("--json", action="store_true", help="print one line of JSON")
        return sub

    peek = command("peek", _peek, 8, "Save a PNG of the next patches: before, after and label of each lesion's slice.")
    peek.add_argument("--out", type=Path, default=Path("peek.png"), help="[%(default)s]")
    peek.add_argument("--columns", type=int, default=2, help="patches beside each other [%(default)s]")
    peek.add_argument("--window", default="-100,240", help="HU shown as black and white [%(default)s]")
    command("stats", _stats, 32, "Print how the gate judged the next patches, and how fast they came.")
    command("bench", _bench, 200, "Read as fast as possible; print rates, waiting times, CPU time and memory.")
    nnunet = commands.add_parser("nnunet", help="Print the folder that nnUNet_extTrainer has to name.")
    nnunet.set_defaults(run=_nnunet)
    what = "Write nnU-Net's preprocessed cases as NIfTI, so that a store holds what nnU-Net's own resampling made of the scans."
    export = commands.add_parser("nnunet-export", help=what, description=what)
    export.set_defaults(run=_nnunet_export)
    export.add_argument("dataset", help="nnU-Net's name or number of the data set")
    export.add_argument("--out", type=Path, required=True, help="a folder for images, labels, datalist and preset")
    export.add_argument("--configuration", default="3d_fullres", help="[%(default)s]")
    export.add_argument("--plans", default="nnUNetPlans", help="[%(default)s]")
    export.add_argument("--label", action="append", default=[], metavar="NNUNET=CLASS", type=_pair,
                        help="the store's class of a label that is called otherwise, such as tumor=liver_tumour")
    return parser


def _nnunet(_: argparse.Namespace) -> str:
    return str(TRAINERS)


def _nnunet_export(options: argparse.Namespace) -> str:
    from .nnunet.preprocessed import export

    cases = export(options.dataset, options.out, configuration=options.configuration, plans=options.plans,
                   labels=dict(options.label))
    return (
        f"{len(cases)} cases are in {options.out}. Next, with nnU-Net's plans file of the data set and a configuration whose "
        f"plan has its labels:\n  freetumor ingest --config CONFIG --plan {options.plans}.json --configuration "
        f"{options.configuration} --datalist {options.out}/dataset.json --preset {options.out}/preset.toml --store STORE\n"
        "and FREETUMOR_HOSTS=preprocessed for the trainer"
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NNUNET=CLASS, got {text!r}")
    return name, value


def _recipe(text: str) -> dict[str, Any]:
    """Reads a recipe given as JSON or as a file's name."""
    if not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8")
    value: Any = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def _open(options: argparse.Namespace, **delivery: Any) -> Stream:
    batch_size: int = options.batch_size
    return stream(
        options.url, options.recipe, start=options.start, batch_size=batch_size, count=-(-options.patches // batch_size),
        codec=options.codec, api_key=options.api_key, **delivery,
    )


def _stats(options: argparse.Namespace) -> dict[str, Any]:
    tally, rates = Tally(), Rates()
    with _open(options, image=options.image) as patches:
        while (batch := rates.take(patches)) is not None:
            tally.add(batch.meta)
    return {**tally.summary(), **rates.summary()}


def _bench(options: argparse.Namespace) -> dict[str, Any]:
    rates = Rates()
    with _open(options, image=options.image) as patches:
        while rates.take(patches) is not None:
            pass
    return rates.summary()


def _peek(options: argparse.Namespace) -> dict[str, Any]:
    low, high = (float(bound) for bound in options.window.split(","))
    panels: list[NDArray[np.uint8]] = []
    metas: list[PatchMeta] = []
    # Always HU, so that the window means the same whatever the server's is.
    with _open(options, image="i16", outputs=("source",)) as patches:
        tumours = {id for name, id in patches.header.labels.items() if name.endswith("_tumour")}
        for batch in patches:
            for i, meta in enumerate(batch.meta):
                image, source, label = batch.image[i, 0], batch.source[i, 0], batch.label[i, 0]
                panels.append(panel(image, source, label, tumours, (low, high)))
                metas.append(meta)
    panels, metas = panels[: options.patches], metas[: options.patches]
    write_png(options.out, mosaic(panels, options.columns))
    lines = [f"{m.index} {m.case} {m.organ} {m.outcome} {_lesions(m)}".rstrip() for m in metas]
    return {"picture": str(options.out), "patches": lines}


def _lesions(meta: PatchMeta) -> str:
    return ", ".join(f"{lesion.diameter_mm:.0f} mm {lesion.realised_hu:+.0f} HU" for lesion in meta.lesions)


def panel(
    image: NDArray[Any], source: NDArray[Any], label: NDArray[np.uint8], tumours: set[int], window_hu: tuple[float, float]
) -> NDArray[np.uint8]:
    """Draws before, after and label beside each other, in the axial slice with most tumour: ``[H, 3 W + gaps, 3]``.

    Anterior is on top, the patient's right on the viewer's left; organs are green, tumours red, *ignore* is dark.
    """
    tumour = np.isin(label, list(tumours))
    z = int(tumour.sum(axis=(1, 2)).argmax()) if tumour.any() else label.shape[0] // 2
    low, high = window_hu

    def grey(volume: NDArray[Any]) -> NDArray[np.float64]:
        level = np.clip((volume[z].astype(np.float64) - low) / (high - low), 0, 1) * 255
        return np.repeat(level[::-1, ::-1, None], 3, axis=2)

    before, after = grey(source), grey(image)
    ids, is_tumour = label[z][::-1, ::-1], tumour[z][::-1, ::-1]
    labelled = after.copy()
    labelled[ids == _IGNORE] *= 0.3
    for mask, colour in [((ids > 0) & (ids != _IGNORE) & ~is_tumour, _ORGAN_COLOUR), (is_tumour, _TUMOUR_COLOUR)]:
        labelled[mask] = 0.6 * labelled[mask] + 0.4 * np.array(colour)
    gap = np.full((before.shape[0], _GAP_PIXELS, 3), 255.0)
    return np.concatenate([before, gap, after, gap, labelled], axis=1).astype(np.uint8)


def mosaic(panels: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Lays panels of one size out in rows, white between them."""
    height, width, _ = panels[0].shape
    rows = -(-len(panels) // columns)
    step_y, step_x = height + 2 * _GAP_PIXELS, width + 2 * _GAP_PIXELS
    sheet = np.full((rows * step_y, columns * step_x, 3), 255, dtype=np.uint8)
    for i, one in enumerate(panels):
        y, x = i // columns * step_y, i % columns * step_x
        sheet[y : y + height, x : x + width] = one
    return sheet


def _readable(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for key, value in report.items():
        name = key.replace("_", " ")
        if isinstance(value, list):
            lines += [f"{name}:", *(f"  {line}" for line in value)]  # pyright: ignore[reportUnknownVariableType]
        elif isinstance(value, dict):
            pairs = ", ".join(f"{k} {v}" for k, v in value.items())  # pyright: ignore[reportUnknownVariableType]
            lines.append(f"{name}: {pairs or '-'}")
        else:
            lines.append(f"{name}: {'-' if value is None else value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
