"""Frames: a 32-byte little-endian preamble, a protobuf header and a payload (docs/wire.md)."""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from . import freetumor_pb2 as pb
from .errors import FrameError

try:
    # The same checksum in a sixth of the time: half of what receiving a batch costs (`pip install freetumor[fast]`).
    from isal.isal_zlib import crc32  # pyright: ignore
except ImportError:
    from zlib import crc32

MAGIC: Final = b"FTUM"
VERSION: Final = 1
#: magic, version, kind, flags, header length, payload length, CRC-32 of the header, reserved
PREAMBLE: Final = struct.Struct("<4sHHIIQI4x")
MAX_HEADER_BYTES: Final = 16 << 20
MAX_FRAME_BYTES: Final = 256 << 20
ALIGNMENT: Final = 64

HEADER, BATCH, HEARTBEAT, END, ERROR = range(1, 6)

_ELEMENTS: Final[dict[int, np.dtype[Any]]] = {
    pb.ELEMENT_TYPE_U8: np.dtype("u1"),
    pb.ELEMENT_TYPE_I16: np.dtype("<i2"),
    pb.ELEMENT_TYPE_F16: np.dtype("<f2"),
    pb.ELEMENT_TYPE_F32: np.dtype("<f4"),
}


class Source(Protocol):
    """Anything that bytes can be read from into a buffer."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Frame(NamedTuple):
    """A frame as it was read: its kind, its header's bytes and its payload, a writable array of bytes."""

    kind: int
    header: bytes
    payload: NDArray[np.uint8]


class Cut(Exception):
    """The bytes end inside a frame."""


def _aligned(length: int) -> NDArray[np.uint8]:
    """Returns `length` writable bytes whose address is a multiple of the tensors' alignment."""
    buffer = np.empty(length + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + length]


def _fill(source: Source, view: memoryview) -> int:
    """Reads until the view is full or the source ends; returns how many bytes were read."""
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


def read_frame(source: Source) -> Frame | None:
    """Reads the next frame from anything with ``readinto``; ``None`` where the bytes end between frames.

    Raises:
        Cut: the bytes end inside a frame.
        FrameError: the bytes are no frame, over a limit, or damaged.
    """
    preamble = bytearray(PREAMBLE.size)
    got = _fill(source, memoryview(preamble))
    if got == 0:
        return None
    if got < PREAMBLE.size:
        raise Cut
    magic, version, kind, _flags, header_length, payload_length, header_crc = PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise FrameError(f"expected a frame starting with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise FrameError(f"expected frame version {VERSION}, got {version}: update the client or the server")
    if header_length > MAX_HEADER_BYTES or payload_length > MAX_FRAME_BYTES:
        raise FrameError(f"frame lengths over the limits: header {header_length}, payload {payload_length} bytes")
    header = bytearray(header_length)
    payload = _aligned(payload_length)
    if _fill(source, memoryview(header)) < header_length or _fill(source, memoryview(payload)) < payload_length:
        raise Cut
    if crc32(header) != header_crc:
        raise FrameError("frame header: the checksum does not match")
    return Frame(kind, bytes(header), payload)


def tensors_of(header: pb.BatchHeader, payload: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Returns the batch's arrays by name, writable, every checksum verified.

    Raw tensors are views of the payload; no byte is copied.
    """
    return {tensor.name: _tensor(tensor, payload) for tensor in header.tensors}


def _tensor(tensor: pb.Tensor, payload: NDArray[np.uint8]) -> NDArray[Any]:
    def refuse(what: str) -> FrameError:
        return FrameError(f"tensor {tensor.name!r}: {what}")

    dtype = _ELEMENTS.get(tensor.element)
    if dtype is None:
        raise refuse(f"unknown element type {tensor.element}")
    elements = 1
    for side in tensor.shape:
        elements *= side
    if elements * dtype.itemsize != tensor.raw_length or tensor.raw_length > MAX_FRAME_BYTES:
        raise refuse(f"shape {list(tensor.shape)} does not fill {tensor.raw_length} bytes")
    stored = payload[tensor.offset : tensor.offset + tensor.stored_length]
    if len(stored) != tensor.stored_length:
        raise refuse(f"lies outside the payload of {len(payload)} bytes")
    if crc32(memoryview(stored)) != tensor.crc32:
        raise refuse("the checksum does not match")
    if tensor.codec == pb.CODEC_RAW:
        raw = stored
        if len(raw) != tensor.raw_length:
            raise refuse(f"expected {tensor.raw_length} bytes, got {len(raw)}")
    elif tensor.codec == pb.CODEC_ZSTD:
        raw = _aligned(tensor.raw_length)
        with zstandard.ZstdDecompressor().stream_reader(memoryview(stored)) as reader:
            if _fill(reader, memoryview(raw)) != tensor.raw_length or reader.read(1):
                raise refuse(f"does not decompress to {tensor.raw_length} bytes")
    else:
        raise refuse(f"unknown codec {tensor.codec}")
    return raw.view(dtype).reshape(tuple(tensor.shape))
