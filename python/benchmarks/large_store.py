"""Serves a store of 100,000 cases and 200 GB, streams from it, and prints one line of JSON with the server's memory.

    python python/benchmarks/large_store.py BINARY [--cases 100000] [--gigabytes 200] [--patches 20000]

Needs nibabel, and about 8 GB of disk: every case is a file of its own with its own header, and the rest of it is a hole
up to its share of the 200 GB. The volumes (128^3 voxels) hold one HU outside and one inside a liver, so that their chunks
take a few bytes; header, chunk table and candidates are as large as of any volume of that size.

`anonymous` is memory of the server's own, `mapped` what the page cache shows of mapped files. The bound of the first is
500 MB.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import nibabel
import numpy as np

import freetumor

SIDE = 128
TEMPLATE = "case-00000"
CONFIG = "[plan]\nspacing_mm = [1.5, 1.5, 1.5]\npatch = [96, 96, 96]\n"
PRESET = 'annotated = ["liver"]\nassumed_tumour_free = true\nkind = "unlabelled"\n[map]\n1 = "liver"\n'
RECIPE = {"synthesizer": "analytic", "gate": {"enabled": False}, "sizes": {"tiny": 1, "small": 1}, "patch": [32, 32, 32],
          "patches_per_epoch": 1 << 20}


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ingest(binary: Path, folder: Path, store: Path) -> None:
    """Ingests the template; on a store that holds it already, this writes the index over all that is there."""
    run(binary, "ingest", "--config", folder / "plan.toml", "--image", folder / f"{TEMPLATE}.nii",
        "--labels", folder / "labels.nii", "--preset", folder / "preset.toml", "--store", store)


def write_template(folder: Path) -> None:
    (folder / "plan.toml").write_text(CONFIG)
    (folder / "preset.toml").write_text(PRESET)
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    z, y, x = np.ogrid[:SIDE, :SIDE, :SIDE]
    labels = ((z - 64) ** 2 + (y - 64) ** 2 + (x - 64) ** 2 < 40**2).astype(np.uint8)
    nibabel.Nifti1Image(labels, affine).to_filename(folder / "labels.nii")
    image = np.where(labels > 0, 100, 0).astype(np.int16)
    nibabel.Nifti1Image(image, affine).to_filename(folder / f"{TEMPLATE}.nii")


def multiply(store: Path, cases: int, bytes_per_case: int) -> None:
    """Copies the template's file under other ids, as docs/store-format.md lays it out, and puts a hole behind it."""
    template = (store / "cases" / f"{TEMPLATE}.ftc").read_bytes()
    header_bytes, payload = struct.unpack_from("<IQ", template, 12)
    body = template[32 : 32 + header_bytes]
    for number in range(1, cases):
        header = body.replace(TEMPLATE.encode(), b"case-%05d" % number)
        preamble = template[:28] + struct.pack("<I", zlib.crc32(header, zlib.crc32(template[:28])))
        with open(store / "cases" / f"case-{number:05d}.ftc", "wb") as file:
            file.write(preamble + header + template[32 + header_bytes : payload] + template[payload:])
            file.truncate(max(bytes_per_case, file.tell()))


def memory(pid: int) -> dict[str, float]:
    """Returns a process's memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    read = {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", status, re.M)}
    return {"anonymous": read["RssAnon"], "mapped": read["RssFile"] + read["RssShmem"], "resident": read["VmRSS"]}


def serve(binary: Path, folder: Path, store: Path, patches: int) -> dict[str, object]:
    begin = time.perf_counter()
    server = subprocess.Popen(
        [binary, "serve", "--config", folder / "plan.toml", "--store", store, "--bind", "127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    try:
        assert server.stdout is not None
        url = next(found.group(0) for line in server.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        started = time.perf_counter() - begin
        threading.Thread(target=server.stdout.read, daemon=True).start()
        idle, most, seen = memory(server.pid), {"anonymous": 0.0, "mapped": 0.0, "resident": 0.0}, set()
        begin = time.perf_counter()
        with freetumor.stream(url, RECIPE, batch_size=8, count=patches // 8, image="i16") as stream:
            for number, batch in enumerate(stream):
                seen.update(meta.case for meta in batch.meta)
                if number % 25 == 0:
                    most = {key: max(value, most[key]) for key, value in memory(server.pid).items()}
        return {
            "seconds_to_serve": round(started, 2),
            "patches": patches,
            "distinct_cases": len(seen),
            "patches_per_s": round(patches / (time.perf_counter() - begin), 1),
            "idle_mib": {key: round(value, 1) for key, value in idle.items()},
            "most_mib": {key: round(value, 1) for key, value in most.items()},
        }
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--gigabytes", type=float, default=200)
    parser.add_argument("--patches", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name) / "store"
        write_template(folder)
        ingest(options.binary, folder, store)
        multiply(store, options.cases, int(options.gigabytes * 1e9 / options.cases))
        begin = time.perf_counter()
        ingest(options.binary, folder, store)
        files = [path.stat() for path in (store / "cases").iterdir()]
        report = {
            "cases": len(files),
            "gigabytes": round(sum(file.st_size for file in files) / 1e9, 1),
            "gigabytes_on_disk": round(512 * sum(file.st_blocks for file in files) / 1e9, 2),
            "index_mib": round((store / "index.bin").stat().st_size / 2**20, 1),
            "seconds_to_index": round(time.perf_counter() - begin, 1),
            **serve(options.binary, folder, store, options.patches),
        }
    print(json.dumps(report))
    return int(report["most_mib"]["anonymous"] > 500)


if __name__ == "__main__":
    sys.exit(main())
