"""A trainer process that may be killed at any moment: its state is one file, replaced as a whole after every batch."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from trainer import open_stream, seen_in


def main(url: str, rank: int, world: int, path: Path) -> None:
    state = json.loads(path.read_text()) if path.exists() else {"cursor": None, "seen": []}
    if state.get("is_done"):
        return
    stream = open_stream(url, rank=rank, world=world, batch_size=1, cursor=state["cursor"])
    for batch in stream:
        state["seen"] += seen_in(batch)
        state["cursor"] = batch.cursor.to_dict()
        save(state, path)
        time.sleep(0.005)
    save({**state, "is_done": True}, path)


def save(state: dict, path: Path) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(state))
    os.replace(beside, path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
