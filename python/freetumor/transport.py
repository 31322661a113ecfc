"""One connection to the server: requests, their refusals, and the frames of a stream."""

from __future__ import annotations

import http.client
import json
import math
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Union, cast
from urllib.parse import urlsplit

from . import freetumor_pb2 as pb
from .batch import Batch
from .errors import FrameError, PatchError, ProblemError, StreamCut
from .frames import BATCH, END, ERROR, HEADER, Cut, Head, read_head, read_tensors, skip_payload
from .meta import Header, cursor_of, header_of, patch_of, reason_of

_FAILED: Final = "urn:freetumor:problem:failed"
_MAX_ANSWER_BYTES: Final = 64 << 20


class End(str):
    """Why a stream ended as it should: ``end_of_epoch``, ``count``, ``shutdown``, ``rebalance``."""


class Connection:
    """An open answer to ``POST /v1/stream``, read frame by frame by one thread.

    Attributes:
        header: what the stream holds.
    """

    def __init__(self, url: str, request: Mapping[str, Any], *, api_key: str | None, timeout: float) -> None:
        self._connection, self._response, self._socket = _ask(
            url, "POST", "/v1/stream", request, api_key=api_key, timeout=timeout,
            accept="application/vnd.freetumor.stream",
        )
        try:
            head = self._next_head()
            if head.kind != HEADER:
                raise FrameError(f"expected the stream's header first, got a frame of kind {head.kind}")
            self.header: Header = header_of(pb.StreamHeader.FromString(head.header))
        except BaseException:
            self.close()
            raise

    def read(self) -> Batch | End:
        """Blocks for the next batch, decoded and its checksums verified, or for the stream's end.

        Raises:
            StreamCut: the bytes ended without an end frame; its ``cursor`` is for the caller to fill in.
            ProblemError: the server stopped with an error.
            FrameError: the bytes are no frame, or a checksum does not match.
        """
        while True:
            head = self._next_head()
            if head.kind == BATCH:
                header = pb.BatchHeader.FromString(head.header)
                with _cuts():
                    arrays = read_tensors(self._response, head, header)
                meta = [patch_of(patch) for patch in header.patches]
                return Batch(arrays, meta, cursor_of(header.next), header.step, tuple(header.reused))
            if head.kind == END:
                return End(reason_of(pb.End.FromString(head.header).reason))
            # Heartbeats and kinds of later versions say nothing that a trainer needs.

    def interrupt(self) -> None:
        """Wakes a thread that waits in :meth:`read`; any thread may call it."""
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is closed already

    def close(self) -> None:
        """Leaves the stream; the server stops making patches for it."""
        self._response.close()
        self._connection.close()

    def _next_head(self) -> Head:
        """Reads the next frame: all of it, but for a batch's payload."""
        with _cuts():
            head = read_head(self._response)
            if head is not None and head.kind != BATCH:
                skip_payload(self._response, head)
        if head is None:
            raise StreamCut("the stream was cut: the connection ended without an end frame", None)
        if head.kind == ERROR:
            problem = pb.Error.FromString(head.header)
            kind = PatchError if problem.type == _FAILED else ProblemError
            raise kind(
                problem.status, problem.title, problem.detail, problem.field or None, problem.type,
                request_id=problem.request_id or None,
            )
        return head


@contextmanager
def _cuts() -> Generator[None]:
    """Makes a cut stream of bytes that end too early, however the connection says so."""
    try:
        yield
    except (Cut, http.client.HTTPException, OSError, ValueError) as error:
        raise StreamCut(f"the stream was cut: {error or 'inside a frame'}", None) from error


def ask(
    url: str, path: str, body: Mapping[str, Any] | None = None, *, api_key: str | None = None, timeout: float = 60.0
) -> bytes:
    """Returns the answer to a request: ``GET``, or ``POST`` of JSON where there is a body.

    Raises:
        ProblemError: the server refused it.
        StreamCut: nobody listens, or the answer broke off.
    """
    method = "GET" if body is None else "POST"
    connection, response, _ = _ask(url, method, path, body, api_key=api_key, timeout=timeout, accept="*/*")
    try:
        answer = response.read(_MAX_ANSWER_BYTES)
        if response.length:
            raise StreamCut(f"the answer to {path} was cut: {response.length} bytes are missing", None)
        return answer
    except (http.client.HTTPException, OSError) as error:
        raise StreamCut(f"the answer to {path} was cut: {error}", None) from error
    finally:
        connection.close()


Http = Union[http.client.HTTPConnection, http.client.HTTPSConnection]


def _ask(
    url: str, method: str, path: str, body: Mapping[str, Any] | None, *,
    api_key: str | None, timeout: float, accept: str,
) -> tuple[Http, http.client.HTTPResponse, socket.socket | None]:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8080, got {url!r}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    headers = {"Accept": accept}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if api_key is not None:
        headers["Authorization"] = f"Bearer {_key(api_key)}"
    text = None if body is None else json.dumps(body)
    try:
        connection.request(method, parts.path.rstrip("/") + path, text, headers)
        # Where the answer ends with its connection, the connection forgets its socket.
        connected = cast("socket.socket | None", connection.sock)
        response = connection.getresponse()
        if response.status != 200:
            raise _problem(response)
    except (http.client.HTTPException, OSError) as error:
        connection.close()
        raise StreamCut(f"cannot open the stream at {url}: {error}", None) from error
    except BaseException:
        connection.close()
        raise
    return connection, response, connected


def _key(text: str) -> str:
    """Returns the key without what stands around it, such as a file's last newline; no error repeats it."""
    key = text.strip()
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError("api_key: expected visible ASCII characters without spaces between them")
    return key


def _problem(response: http.client.HTTPResponse) -> ProblemError:
    body = response.read(1 << 20)
    try:
        problem = json.loads(body)
        if not isinstance(problem, dict):
            raise ValueError("no object")
        members = cast("dict[str, Any]", problem)
    except ValueError:
        members = {"title": response.reason, "detail": body[:500].decode("utf-8", "replace")}
    try:
        seconds = float(response.headers["Retry-After"])
        retry_after = seconds if math.isfinite(seconds) and seconds >= 0 else None
    except (TypeError, ValueError):
        retry_after = None
    return ProblemError(
        response.status,
        str(members.get("title", "")),
        str(members.get("detail", "")),
        members.get("field"),
        str(members.get("type", "about:blank")),
        retry_after,
        request_id=members.get("request_id"),
        body=members,
    )
