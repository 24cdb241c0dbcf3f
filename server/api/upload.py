"""Receives an adapter: a multipart body, written to the store's staging area as it arrives and never held in memory.

Owns the form's rules (which fields, which files, how large). Looks into no file: `Inspect` does while it arrives, and
`Validate` once it is whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters_store.staging import Staged, StagedFile

from ..errors import MalformedError, TooLargeError, ValidationError
from .context import Inspect, anything

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_BOUNDARY = 70  # characters, of RFC 2046
_MAX_HEADERS = 4096  # bytes of one part's headers
_MAX_FIELD = 1024  # bytes of `adapter_id`
_MAX_PARTS = 64
_LEFT_OUT = frozenset({"README.md"})  # save_pretrained writes it; a model card does not make another adapter

_Kind = Literal["begin", "data", "end"]


@dataclass(frozen=True, slots=True)
class Part:
    """What a part's headers say: its form field, and its file's name if it is a file."""

    field: str
    filename: str | None


@dataclass(slots=True)
class _Events:
    """What the parser found in the bytes it was given, in order."""

    headers: bytearray = field(default_factory=bytearray)
    name: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    found: list[tuple[_Kind, Part | bytes]] = field(default_factory=list)
    parts: int = 0
    complete: bool = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self.found.append(("data", data[start:end])),
            "on_part_end": lambda: self.found.append(("end", b"")),
            "on_end": self._end,
        }

    def _part(self) -> None:
        self.parts += 1
        self.disposition = b""
        self.name.clear()
        self.headers.clear()
        if self.parts > _MAX_PARTS:
            raise ValidationError(f"the form may have {_MAX_PARTS} parts, it has more")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.name += data[start:end]
        self._bound(self.name)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.headers += data[start:end]
        self._bound(self.headers)

    def _header_end(self) -> None:
        if bytes(self.name).lower() == b"content-disposition":
            self.disposition = bytes(self.headers)
        self.name.clear()
        self.headers.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self.disposition)
        if b"name" not in options:
            raise MalformedError("a part of the form has no name")
        filename = options.get(b"filename")
        shown = None if filename is None else _decoded(filename)
        self.found.append(("begin", Part(_decoded(options[b"name"]), shown)))

    def _end(self) -> None:
        self.complete = True

    @staticmethod
    def _bound(headers: bytearray) -> None:
        if len(headers) > _MAX_HEADERS:
            raise MalformedError(f"a part of the form has more than {_MAX_HEADERS} bytes of headers")


class Upload:
    """One form on its way into `staged`. After `receive`, `adapter_id` is set and every file is staged.

    Usage:
        upload = Upload(staged, max_bytes=limit)
        await upload.receive(request.headers["content-type"], request.stream())
        upload.adapter_id
    """

    def __init__(self, staged: Staged, max_bytes: int, inspect: Inspect = anything) -> None:
        self.adapter_id = ""
        self.received = 0  # bytes
        self._staged = staged
        self._max_bytes = max_bytes
        self._inspect = inspect
        self._looked_at: Callable[[bytes], None] = lambda data: None
        self._value = bytearray()
        self._part: Part | None = None
        self._file: StagedFile | None = None
        self._open = ExitStack()

    async def receive(self, content_type: str, chunks: AsyncIterator[bytes]) -> None:
        """Raises: TooLargeError while receiving, AdapterError for a file that cannot be one of an adapter, MalformedError for
        what is no form, ValidationError naming the field.
        """
        events = _Events()
        parser = MultipartParser(_boundary(content_type), events.callbacks())
        try:
            async for chunk in chunks:
                self._count(chunk)
                _parsing(lambda: parser.write(chunk))  # noqa: B023 - called before the next chunk
                await to_thread.run_sync(self._apply, events)
            _parsing(parser.finalize)
        except BaseException as error:
            self._abandon(error)
            raise
        if not events.complete:
            raise MalformedError("the form ends too early")
        self._check()

    def _count(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received > self._max_bytes:
            raise TooLargeError(f"an upload may have {self._max_bytes} bytes, all files together; it has more")

    def _apply(self, events: _Events) -> None:
        """Store what a chunk held; in a thread, as it writes to disk."""
        for kind, value in events.found:
            if isinstance(value, Part):
                self._begin(value)
            elif kind == "data":
                self._data(value)
            else:
                self._end()
        events.found.clear()

    def _begin(self, part: Part) -> None:
        self._part = part
        self._value.clear()
        if part.field == "files":
            self._begin_file(part.filename)
        elif part.field != "adapter_id" or part.filename is not None:
            raise ValidationError(f"`{part.field[:80]}` is not a field of this form: `adapter_id` (text), `files`")

    def _begin_file(self, filename: str | None) -> None:
        if not filename:
            raise ValidationError("`files` must be files with names")
        if filename.rpartition("/")[2] not in _LEFT_OUT:
            self._looked_at = self._inspect(filename)
            self._file = self._open.enter_context(self._staged.file(filename))

    def _data(self, data: bytes) -> None:
        if self._file is not None:
            self._looked_at(data)
            self._file.write(data)
        elif self._part is not None and self._part.field == "adapter_id":
            self._value += data
            if len(self._value) > _MAX_FIELD:
                raise ValidationError(f"`adapter_id` may have {_MAX_FIELD} bytes, it has more")

    def _end(self) -> None:
        if self._part is not None and self._part.field == "adapter_id":
            self.adapter_id = _decoded(bytes(self._value))
        self._open.close()
        self._file, self._part = None, None

    def _abandon(self, error: BaseException) -> None:
        """Leave the file that was being written as broken, so that it can never be published."""
        self._open.__exit__(type(error), error, error.__traceback__)

    def _check(self) -> None:
        if not self.adapter_id:
            raise ValidationError("`adapter_id` is required")
        if not self._staged.paths:
            raise ValidationError("`files` is required")


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MalformedError("Expected request with `Content-Type: multipart/form-data; boundary=...`")
    boundary = options[b"boundary"]
    if len(boundary) > _MAX_BOUNDARY:
        raise MalformedError(f"the form's boundary may have {_MAX_BOUNDARY} characters, it has {len(boundary)}")
    return boundary


def _parsing(step: Callable[[], object]) -> None:
    try:
        step()
    except FormParserError as error:
        raise MalformedError(f"the body is not a multipart form: {error}") from error


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "replace")
