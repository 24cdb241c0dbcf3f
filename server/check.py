"""Check: what a directory would be as an upload, or why it would be refused, found out without a server.

Owns the report. Runs the very readers a server runs, on the base's sizes alone where they suffice: its weights are read
one by one for families that are held against them, and it is loaded only where its files cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from adapters_store import manifest
from adapters_store.digest import Digest
from adapters_store.records import JSON

from .assembly import tokenizer_of, upload_limits
from .checkpoints.folder import Folder
from .errors import AdapterError
from .methods.base import BaseShape, Limits, Part
from .methods.read import describe, read_parts
from .model.loader import load_base
from .model.outline import StoredWeights, WeightsNeededError, outline
from .model.pull import Report, quiet, resolve
from .model.text import Text
from .settings import Settings, default_home


@dataclass(frozen=True)
class Verdict:
    """What an upload would be (`details`, as a server's 201 answer has them), or what is wrong with it (`refusal`)."""

    model: str
    base_weights: str  # what had to be read of the base
    digest: Digest  # under which a server would store it for that tenant
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    details: Mapping[str, JSON] = field(default_factory=dict)
    refusal: AdapterError | None = None

    def to_json(self) -> dict[str, JSON]:
        said: dict[str, JSON] = {
            "accepted": self.refusal is None,
            "model": self.model,
            "base_weights": self.base_weights,
            "digest": self.digest,
            "files": list(self.files),
            "left_out": list(self.left_out),
        }
        if self.refusal is not None:
            return {**said, "field": self.refusal.field, "reason": self.refusal.reason}
        return {**said, **self.details}


def check_directory(directory: Path, settings: Settings, report: Report = quiet, tenant: str = "default") -> Verdict:
    """Hold an adapter's directory against `settings.model`, which is fetched if need be, and the settings' limits.

    The digest is the one it would have as an upload of `tenant`.

    Raises: AdapterdError for a base that cannot be had or served; a refused adapter is a verdict.
    """
    folder = Folder.of(directory)
    base = _Base(resolve(settings.model, default_home(), report))
    details: Mapping[str, JSON] = {}
    refusal = None
    try:
        details = describe(base.read(folder.files, upload_limits(settings)))
    except AdapterError as error:
        refusal = error
    digest, files = _digest(folder, tenant), tuple(folder.files)
    return Verdict(settings.model, base.weights, digest, files, folder.left_out, details, refusal)


class _Base:
    """A base in a directory, known as far as it had to be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stored: StoredWeights | None = None

    @property
    def weights(self) -> str:
        if self._stored is None:
            return "loaded"
        return f"{self._stored.read} tensors read" if self._stored.read else "not read"

    def read(self, files: Mapping[str, Path], limits: Limits) -> tuple[Part, ...]:
        """Raises: AdapterError."""
        try:
            return read_parts(files, self._outlined(), limits)
        except WeightsNeededError:
            self._stored = None
            return read_parts(files, self._loaded(), limits)

    def _outlined(self) -> BaseShape:
        try:
            shape, self._stored = outline(self._directory)
        except Exception as error:  # whatever is odd about the base, loading it finds the words for it
            raise WeightsNeededError(str(error)) from error
        return replace(shape, tokens=self._tokens)

    def _loaded(self) -> BaseShape:
        base = load_base(self._directory, torch.device("cpu"), torch.float32)
        return replace(base.shape, tokens=self._tokens)

    def _tokens(self, piece: str, first: bool) -> Sequence[int]:
        """`BaseShape.tokens`. A base without a tokenizer is fit to check whatever is no text."""
        return self._text.encode_piece(piece, first)

    @cached_property
    def _text(self) -> Text:
        return Text(tokenizer_of(self._directory))


def _digest(folder: Folder, tenant: str) -> Digest:
    """As the store computes it, from the files as they are."""
    contents = {name: path.read_bytes() for name, path in folder.files.items()}
    entries = {name: manifest.Entry(Digest.of(data), len(data)) for name, data in contents.items()}
    return Digest.of(manifest.encode(tenant, entries))
