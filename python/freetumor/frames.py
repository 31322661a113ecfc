"""Frames: a 32-byte little-endian preamble, a protobuf header and a payload (docs/wire.md)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from . import freetumor_pb2 as pb
from .errors import FrameError

try:
    # The same checksum in a sixth of the time, where there is a wheel of it.
    from isal.isal_zlib import crc32  # pyright: ignore
except ImportError:
    from zlib import crc32

MAGIC: Final = b"FTUM"
VERSION: Final = 1
#: magic, version, kind, flags, header length, payload length, CRC-32 of the header, reserved
PREAMBLE: Final = struct.Struct("<4sHHIIQI4x")
MAX_HEADER_BYTES: Final = 16 << 20
MAX_FRAME_BYTES: Final = 256 << 20
MAX_TENSORS: Final = 32
ALIGNMENT: Final = 64
#: A payload is hashed piece by piece as it arrives: the server fills the socket again meanwhile, and a piece is still in the
#: cache. With the whole payload read first, the server waited for every checksum.
PIECE_BYTES: Final = 256 << 10

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


class Head(NamedTuple):
    """What stands before a frame's payload: the frame's kind, its header's bytes, and how many bytes follow."""

    kind: int
    header: bytes
    payload_bytes: int


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


def read_head(source: Source) -> Head | None:
    """Reads the next frame up to its payload from anything with ``readinto``; ``None`` where the bytes end between frames.

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
    if _fill(source, memoryview(header)) < header_length:
        raise Cut
    if crc32(header) != header_crc:
        raise FrameError("frame header: the checksum does not match")
    return Head(kind, bytes(header), payload_length)


def skip_payload(source: Source, head: Head) -> None:
    """Reads past a payload that nobody needs, as frames of later versions may have."""
    piece = memoryview(bytearray(min(head.payload_bytes, PIECE_BYTES)))
    left = head.payload_bytes
    while left > 0:
        count = source.readinto(piece[: min(left, PIECE_BYTES)])
        if not count:
            raise Cut
        left -= count


def read_tensors(source: Source, head: Head, header: pb.BatchHeader) -> dict[str, NDArray[Any]]:
    """Reads a batch's payload; returns its arrays by name, writable, every checksum verified.

    Raw tensors are views of one buffer; no byte is copied.

    Raises:
        Cut: the bytes end inside the payload.
        FrameError: a tensor contradicts the payload, or is damaged.
    """
    raw_bytes = sum(tensor.raw_length for tensor in header.tensors)
    if len(header.tensors) > MAX_TENSORS or raw_bytes > MAX_FRAME_BYTES:
        raise FrameError(f"over the limits: {len(header.tensors)} tensors of {raw_bytes} bytes together")
    spans = [(tensor.offset, tensor.offset + tensor.stored_length) for tensor in header.tensors]
    payload, checksums = _read_payload(source, head.payload_bytes, spans)
    return {
        tensor.name: _tensor(tensor, payload, checksum) for tensor, checksum in zip(header.tensors, checksums)
    }


def _read_payload(
    source: Source, length: int, spans: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.uint8], list[int]]:
    """Reads a payload; returns it with the CRC-32 of each span of it."""
    payload = _aligned(length)
    view = memoryview(payload)
    checksums = [0] * len(spans)
    filled = 0
    while filled < length:
        count = source.readinto(view[filled : filled + PIECE_BYTES])
        if not count:
            raise Cut
        for n, (start, end) in enumerate(spans):
            first, last = max(start, filled), min(end, filled + count)
            if first < last:
                checksums[n] = crc32(view[first:last], checksums[n])
        filled += count
    return payload, checksums


def _tensor(tensor: pb.Tensor, payload: NDArray[np.uint8], checksum: int) -> NDArray[Any]:
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
    if checksum != tensor.crc32:
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
