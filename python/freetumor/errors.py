"""What can go wrong, each with the facts a trainer needs to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .meta import Cursor


class FreeTumorError(Exception):
    """The base of every error of this package."""


class ProblemError(FreeTumorError):
    """The server refused the request or ended the stream with an RFC 9457 problem.

    Attributes:
        status: the HTTP status: 409 another stream's cursor, 410 models gone, 422 a field, 429 and 503 try again.
        title: the kind of problem in words.
        detail: what happened.
        field: the request's field, such as ``recipe.gate.recall``, or ``None``.
        type: the kind of problem as a URI.
        retry_after: seconds after which to try again, or ``None``.
        cursor: where to go on, for a problem inside a stream, or ``None``.
        request_id: what the server's log calls the request, or ``None``.
        body: the problem document as it was sent, members of later versions included.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        field: str | None = None,
        type: str = "about:blank",
        retry_after: float | None = None,
        cursor: Cursor | None = None,
        request_id: str | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{status} {title}: {detail}")
        self.status = status
        self.title = title
        self.detail = detail
        self.field = field
        self.type = type
        self.retry_after = retry_after
        self.cursor = cursor
        self.request_id = request_id
        document = {
            "type": type, "title": title, "status": status, "detail": detail, "field": field, "request_id": request_id,
        }
        self.body: dict[str, Any] = dict(document if body is None else body)


class PatchError(ProblemError):
    """A patch could not be made and the stream was opened with ``on_failed="error"``."""


class FrameError(FreeTumorError):
    """The bytes are no frame of this protocol, or a checksum does not match: the data must not be used."""


class StreamCut(FreeTumorError, ConnectionError):
    """The stream ended before all was sent: the connection broke, or the server said ``shutdown`` or ``rebalance``.

    Never a short epoch: go on with ``cursor``.

    Attributes:
        cursor: where to go on after the last batch that was consumed, or ``None`` before the stream's header.
    """

    def __init__(self, message: str, cursor: Cursor | None) -> None:
        super().__init__(message)
        self.cursor = cursor
