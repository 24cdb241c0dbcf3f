"""Staged: one upload on its way in, before anybody can see it. Owns its drafts.

Touches neither the blobs nor the catalog: `Store.publish` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from . import manifest
from .digest import Digest
from .drafts import Draft
from .errors import Conflict, Invalid, TooLarge, disk_errors
from .manifest import Entry
from .names import check_file_name

MAX_FILES = 64  # per upload; each holds a descriptor until the upload ends


class StagedFile:
    """One file being received; `write` may be called with chunks of any size."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._append = append

    def write(self, data: bytes) -> int:
        """Raises: TooLarge before the byte that would pass the upload's limit is written; Unavailable."""
        self._append(data)
        return len(data)


class Staged:
    """The files of one upload. Used by one thread at a time; leaving the context removes what was not published.

    Usage:
        with store.stage(max_bytes=limit) as staged:
            with staged.file("adapter_config.json") as file:
                file.write(chunk)
            report = validate(staged.paths)
            store.publish(staged, ...)
    """

    def __init__(self, draft: Callable[[], Draft], max_bytes: int | None = None) -> None:
        self._draft = draft
        self._max_bytes = max_bytes
        self._drafts: list[Draft] = []
        self._files: dict[str, Draft] = {}
        self._state: Literal["ready", "receiving a file", "broken", "published", "closed"] = "ready"

    @contextmanager
    def file(self, name: str) -> Iterator[StagedFile]:
        """A new file, part of the upload once the block ends without an exception.

        Raises: Invalid when the name is not plain, was used before, or is one too many; Unavailable.
        """
        self._admit(name)
        draft = self._new_draft()
        self._state = "receiving a file"
        try:
            yield StagedFile(lambda data: self._append(draft, data))
        except BaseException:
            self._state = "broken"
            raise
        self._finish(name, draft)

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """`file` in one call."""
        with self.file(name) as file:
            for chunk in chunks:
                file.write(chunk)

    @property
    def paths(self) -> Mapping[str, Path]:
        """File name -> a readable temporary file, for validation."""
        return {name: draft.path for name, draft in self._files.items()}

    @property
    def size_bytes(self) -> int:
        return sum(draft.size for draft in self._drafts)

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: Entry(draft.digest, draft.size) for name, draft in self._files.items()}

    def digest_for(self, tenant: str) -> Digest:
        """What `seal` will say, as long as no file is added."""
        return Digest.of(manifest.encode(tenant, self.entries))

    def seal(self, tenant: str) -> tuple[Digest, list[Draft]]:
        """The digest of `tenant`'s adapter, and every draft to keep: the files, and the manifest last. Only once.

        Raises: Invalid when there is no file; Conflict when a file broke off or the upload was published before.
        """
        self._require_ready()
        if not self._files:
            raise Invalid("files", "an upload needs at least one file", 0)
        listing = self._new_draft()
        with disk_errors():
            listing.write(manifest.encode(tenant, self.entries))
        self._state = "published"
        return listing.digest, [*self._files.values(), listing]

    def discard(self) -> None:
        """Ends the upload and removes every draft that was not published. Idempotent.

        Never fails: it runs while errors and successes are on their way out, and the next sweep gets what it leaves.
        """
        self._state = "closed"
        for draft in self._drafts:
            with suppress(OSError):
                draft.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.discard()

    def _admit(self, name: str) -> None:
        check_file_name(name)
        self._require_ready()
        if name in self._files:
            raise Invalid("files", "a file name may be used once per upload", name)
        if len(self._files) >= MAX_FILES:
            raise Invalid("files", f"at most {MAX_FILES} files per upload", len(self._files) + 1)

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise Conflict(f"upload: is {self._state}")

    def _append(self, draft: Draft, data: bytes) -> None:
        """A chunk that could not be stored breaks the upload, even if the caller goes on: no byte may be missing."""
        if self._state != "receiving a file" or draft is not self._drafts[-1]:
            raise Conflict("upload: this file is closed")
        total = self.size_bytes + len(data)
        self._state = "broken"
        if self._max_bytes is not None and total > self._max_bytes:
            raise TooLarge(self._max_bytes, total)
        with disk_errors():
            draft.write(data)
        self._state = "receiving a file"

    def _finish(self, name: str, draft: Draft) -> None:
        if self._state == "receiving a file":
            self._files[name] = draft
            self._state = "ready"

    def _new_draft(self) -> Draft:
        draft = self._draft()
        self._drafts.append(draft)
        return draft
