"""Compiles the kernels once per machine and keeps the library in a cache: `<cache>/native/<key>/libadapterd.so`.

Owns the compiler's command line, the cache key, the lock and the prebuilt libraries an image may carry. Never loads a
library and knows no kernel.

    key = sha256(sources, flags, compiler version, processor, OpenMP runtime)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
LIBRARY = "libadapterd.so"
COMPILERS = ("g++", "c++", "clang++")
#: No -ffast-math: NaN must stay NaN, and sums keep their order. Contraction to fused multiply-adds is wanted.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
)
TIMEOUT_SECONDS = 120
#: What each prebuilt level needs, most capable first (a subset of the x86-64 psABI's levels).
LEVELS = {
    "x86-64-v4": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"),
    "x86-64-v3": ("avx2", "fma", "bmi2", "f16c"),
}

Progress = Callable[[str], None]


class NativeUnavailable(Exception):  # noqa: N818  # a state of the machine that callers fall back from
    """The kernels cannot be used on this machine; `str()` is the reason."""


def library_path(cache_dir: Path, on_progress: Progress) -> Path:
    """The library for this machine: from the cache, compiled now, or prebuilt, in this order.

    Raises: NativeUnavailable when there is neither a compiler nor a prebuilt library for this processor.
    """
    if sys.platform == "win32" or sys.byteorder != "little":
        raise NativeUnavailable(f"no native kernels for {sys.platform}, {sys.byteorder} endian")
    try:
        compiler = find_compiler()
    except NativeUnavailable:
        if (prebuilt := _prebuilt()) is not None:
            return prebuilt
        raise
    runtime = openmp_runtime()
    key = _key(compiler, runtime)
    library = cache_dir / "native" / key / LIBRARY
    if library.exists():  # maybe in a cache that this process cannot write
        return library
    library = _writable(cache_dir / "native") / key / LIBRARY
    with _locked(library.parent):
        if not library.exists():
            on_progress(f"compiling native kernels with {compiler} (once per machine)")
            _compile(compiler, "native", runtime, library)
    return library


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX if set, else the first of g++, c++, clang++.

    Raises: NativeUnavailable when there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    raise NativeUnavailable(f"no C++ compiler found (looked for {wanted or ', '.join(COMPILERS)})")


def openmp_runtime() -> Path | None:
    """The OpenMP library torch has loaded: sharing it means one thread pool. None = link the system's."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        maps = ""
    loaded = re.search(r"(/\S*libgomp[^\s/]*\.so\S*)", maps)
    if loaded:
        return Path(loaded.group(1))
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def source_digest() -> str:
    """Identifies the kernels' source text; a prebuilt library is used only if it was made from this very text."""
    digest = hashlib.sha256()
    for path in (*sorted(HERE.glob("*.h")), *sources()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(compiler: str, runtime: Path | None) -> str:
    version = _run([compiler, "--version"])
    text = "\0".join((source_digest(), *FLAGS, compiler, version, _processor(), str(runtime)))
    return hashlib.sha256(text.encode()).hexdigest()


def _processor() -> str:
    """Model and features: a home directory may be shared by machines on which -march=native means different things."""
    info = _cpuinfo()
    wanted = [line for line in info.splitlines() if re.match(r"(model name|flags|CPU part|Features)\s*:", line)]
    return "\n".join(sorted(set(wanted))) or f"{platform.machine()} {platform.processor()}"


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _writable(wanted: Path) -> Path:
    """`wanted`, or where it cannot be written a directory of this user's own under the temporary one.

    Raises: NativeUnavailable when neither can be written.
    """
    for path in (wanted, Path(tempfile.gettempdir()) / f"adapterd-native-{os.getuid()}"):
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = path.lstat()
        except OSError:
            continue
        private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if (path is wanted or private) and os.access(path, os.W_OK | os.X_OK):
            return path
    raise NativeUnavailable(f"neither {wanted} nor {tempfile.gettempdir()} can be written")


@contextmanager
def _locked(where: Path) -> Iterator[None]:
    """One compiler at a time per key; the loser of the race finds the winner's library."""
    with where.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, march: str, runtime: Path | None, target: Path) -> None:
    """Compiles every source (at the same time), links, and renames into place: `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
        objects = [Path(work) / f"{source.stem}.o" for source in sources()]
        _run_all(
            [compiler, *FLAGS, f"-march={march}", "-c", str(source), "-o", str(made)]
            for source, made in zip(sources(), objects, strict=True)
        )
        made = Path(work) / LIBRARY
        openmp = [str(runtime)] if runtime else ["-fopenmp"]
        _run([compiler, "-shared", *map(str, objects), *openmp, "-o", str(made)])
        made.replace(target)


def _run_all(commands: Iterable[Sequence[str]]) -> None:
    """All commands at once. Raises: NativeUnavailable with the first error any of them printed."""
    with tempfile.TemporaryFile("w+") as log:
        running = [subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL) for command in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            log.seek(0)
            raise NativeUnavailable(f"the compiler failed: {_first_error(log.read())}")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        raise NativeUnavailable(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")[:300]


def _prebuilt() -> Path | None:
    """The most capable prebuilt library this processor runs, made from exactly these sources."""
    flags = re.search(r"^flags\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    features = set(flags.group(1).split()) if flags else set()
    folder = PREBUILT / source_digest()
    for level, needs in LEVELS.items():
        library = folder / level / LIBRARY
        if features.issuperset(needs) and library.exists():
            return library
    return None


def prebuild(levels: Sequence[str], folder: Path = PREBUILT) -> list[Path]:
    """Compiles one library per processor level into the package, for images that ship no compiler."""
    compiler, runtime = find_compiler(), openmp_runtime()
    made = []
    for level in levels:
        target = folder / source_digest() / level / LIBRARY
        _compile(compiler, level, runtime, target)
        made.append(target)
    return made
