"""The client's memory stays flat, however long it reads."""

from __future__ import annotations

import json
import subprocess
import sys

from server import BINARY, ROOT

#: Reads 20,000 patches in a process of its own and prints what it holds every 2,000: RssAnon in KiB.
READER = """
import json, re, sys
import freetumor

def memory_kib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

held, patches = [], 0
with freetumor.stream(sys.argv[1], batch_size=2, count=10_000, image="f16", prefetch=4) as stream:
    for batch in stream:
        patches += len(batch.meta)
        if patches % 2_000 == 0:
            held.append(memory_kib())
print(json.dumps({"patches": patches, "held": held, "end": str(stream.end_reason)}))
"""


def test_memory_is_flat_over_20_000_patches() -> None:
    # From memory, so that the client is what takes the time.
    serving = subprocess.Popen(
        [BINARY, "bench", "serve", "--listen", "--side", "32"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )
    try:
        assert serving.stdout is not None
        url = serving.stdout.readline().strip()
        reading = subprocess.run([sys.executable, "-c", READER, url], capture_output=True, text=True, timeout=600)
        assert reading.returncode == 0, reading.stderr
        read = json.loads(reading.stdout)
    finally:
        serving.kill()
        serving.wait()
    assert (read["patches"], read["end"], len(read["held"])) == (20_000, "count", 10)
    # A megabyte is five batches, of nine thousand.
    first, last = read["held"][0], read["held"][-1]
    assert last - first < 1024, read["held"]
