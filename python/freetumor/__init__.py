"""Client of FreeTumor: streams synthesized, gated CT tumour patches as numpy arrays.

>>> import freetumor
>>> for batch in freetumor.stream("http://127.0.0.1:8080"):   # doctest: +SKIP
...     train(batch.image, batch.label)
"""

from .aio import AsyncStream, astream
from .batch import Batch
from .client import Stream, resolve, stream
from .errors import FrameError, FreeTumorError, PatchError, ProblemError, StreamCut
from .meta import Cursor, GateScores, Header, Lesion, PatchMeta

__all__ = [
    "AsyncStream",
    "Batch",
    "Cursor",
    "FrameError",
    "FreeTumorError",
    "GateScores",
    "Header",
    "Lesion",
    "PatchError",
    "PatchMeta",
    "ProblemError",
    "Stream",
    "StreamCut",
    "astream",
    "resolve",
    "stream",
]
