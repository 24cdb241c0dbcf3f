"""An adapter's directory on the user's side: which of its files make an upload, and pickled weights as safetensors.

Owns the names that libraries give pickled weights. The server never runs this on an upload: unpickling is for whoever
trusts the file, and even here it is torch's, which builds tensors and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from .files import CONFIG, READ

#: What PEFT and AdapterHub call pickled weights -> what they call the same tensors as safetensors.
PICKLED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "adapter_model.bin": "adapter_model.safetensors",
        "pytorch_adapter.bin": "adapter.safetensors",
        "pytorch_model_head.bin": "model_head.safetensors",
    }
)
_STATE_OF_TRAINING: Final = "checkpoint-"  # a Trainer's earlier states of the same adapter, not parts of it


@dataclass(frozen=True)
class Folder:
    """A directory as an upload: name in the upload ("file" or "part/file") -> file, and the names that stay behind."""

    files: Mapping[str, Path]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path) -> Folder:
        """Weights that are there as a pickle alone are among `files`, so that the upload is refused, and says why."""
        files, left_out = {}, []
        for part, path in _parts(directory):
            for file in sorted(item for item in path.iterdir() if item.is_file()):
                name = f"{part}/{file.name}" if part else file.name
                if file.name in READ or _only_pickled(file):
                    files[name] = file
                else:
                    left_out.append(name)
        return cls(MappingProxyType(files), tuple(left_out))


def _parts(directory: Path) -> Iterator[tuple[str, Path]]:
    """(part, its directory): the directory itself, and each directory in it that holds an adapter."""
    yield "", directory
    for path in sorted(directory.iterdir()):
        if (path / CONFIG).is_file() and not path.name.startswith(_STATE_OF_TRAINING):
            yield path.name, path


def _only_pickled(file: Path) -> bool:
    target = PICKLED.get(file.name)
    return target is not None and not file.with_name(target).exists()


@dataclass(frozen=True)
class Conversion:
    """One file written: names as in the upload, `tensors` how many it holds."""

    source: str
    target: str
    tensors: int


def convert(directory: Path, out: Path) -> tuple[Conversion, ...]:
    """Write pickled weights as safetensors into `out`, which may be `directory`, and copy what else makes the upload.

    Deletes nothing, overwrites nothing: weights that are there as safetensors already are not read again.

    Raises: AdapterError naming a file that holds more than tensors, or the directory where nothing is to be done.
    """
    files = Folder.of(directory).files
    pickled = [name for name in files if name.rpartition("/")[2] in PICKLED]
    if not pickled:
        raise AdapterError(str(directory), f"holds nothing to convert, which would be {', '.join(PICKLED)} by themselves")
    done = tuple(_converted(name, files[name], out) for name in pickled)
    for name in files.keys() - pickled:
        if not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], out / name)
    return done


def _converted(name: str, file: Path, out: Path) -> Conversion:
    target = (out / name).with_name(PICKLED[file.name])
    shown = target.relative_to(out).as_posix()
    if target.exists():
        raise AdapterError(shown, f"is in {out} already; nothing is overwritten")
    tensors = _unpickled(name, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = target.with_name(f".{target.name}.partial")
    save_file(tensors, written, metadata={"format": "pt"})
    written.rename(target)
    return Conversion(name, shown, len(tensors))


def _unpickled(name: str, file: Path) -> dict[str, Tensor]:
    """Contiguous copies: views of one storage, which a pickle may hold, cannot be told apart in a safetensors file."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a file that is not its own is nowhere written down
        reason = str(error).strip().partition("\n")[0][:200]
        raise AdapterError(name, f"cannot be read as tensors and nothing else: {reason or type(error).__name__}") from error
    if not isinstance(stored, Mapping) or not stored:
        raise AdapterError(name, f"holds a {type(stored).__name__}, a file of weights holds tensors by name")
    for key, value in stored.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterError(name, f"holds {str(key)[:80]!r}, a {type(value).__name__}, a file of weights holds tensors")
    return {key: value.detach().clone().contiguous() for key, value in stored.items()}
