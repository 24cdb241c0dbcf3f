"""Uploads that would run code, open files, reach the network or keep a CPU busy in a library that believes its config.

Each class is named after the CVE or the field that made it known. All go through POST /adapters of a whole server.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.uploads import lora, packed, tensors
from tests.house import Caller
from tests.security.conftest import refusal
from tests.security.contents import CONFIG, WEIGHTS, prompt
from tests.security.watch import watched

SOUND = lora(1)


class Trap:
    """Writes a file where it is unpickled, then ends the process."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import pathlib, os; pathlib.Path({str(self.mark)!r}).touch(); os._exit(13)",)


def torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl", "ADAPTER.CKPT", WEIGHTS])
def test_cve_2025_32434_a_torch_pickle_is_refused_by_name_and_never_opened_by_torch(
    acme: Caller, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("torch.load was called"))
    mark = tmp_path / "mark"
    with watched() as seen:
        words = refusal(acme.upload("trap", {CONFIG: SOUND[CONFIG], name: pickle.dumps(Trap(mark))}))
    assert name in words
    assert seen.of("pickle.find_class") == []
    assert not mark.exists()


def test_cve_2026_24747_a_pickle_that_weights_only_would_take_is_refused_too(acme: Caller) -> None:
    """Plain tensors alone: `weights_only` has been broken twice, so that it would load is no reason to load it."""
    with watched() as seen:
        words = refusal(acme.upload("tame", {CONFIG: SOUND[CONFIG], "adapter_model.bin": torch_file(tensors(1))}))
    assert words.startswith("adapter_model.bin: pickled files are not accepted")
    assert seen.of("pickle.find_class") == []


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("../../escaped", b"0" * (1 << 20))
    elif kind == "gz":
        buffer.write(gzip.compress(b"0" * (1 << 20)))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as packed_up:
            member = tarfile.TarInfo("../../escaped")
            member.size = 1 << 20
            packed_up.addfile(member, io.BytesIO(b"0" * (1 << 20)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "name"), [("zip", "adapter.zip"), ("tar", "adapter.tar.gz"), ("zip", WEIGHTS), ("gz", CONFIG)]
)
def test_archive_bombs_and_slips_are_never_unpacked(acme: Caller, kind: str, name: str) -> None:
    with watched() as seen:
        words = refusal(acme.upload("packed", {**SOUND, name: archive(kind)}))
    assert name in words
    assert seen.mentions("escaped") == []


@pytest.mark.parametrize(
    "config",
    [
        {"auto_mapping": {"base_model_class": "Trap", "parent_library": "adapterd_trap"}},
        {"megatron_config": {"x": 1}, "megatron_core": "adapterd_trap"},
        {"megatron_core": "adapterd_trap"},
        {"auto_map": {"AutoModel": "adapterd_trap.Trap"}, "trust_remote_code": True},
        {"peft_type": "adapterd_trap.Trap"},
        {"custom_modules": {"adapterd_trap": "Trap"}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_auto_mapping_and_megatron_core_import_no_module(
    acme: Caller, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapterd_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with watched() as seen:
        response = acme.upload("importer", packed(tensors(1), **config))
        if response.status_code == 201:
            acme.tokens("importer")
    assert response.status_code in (201, 422)
    assert seen.mentions("adapterd_trap") == []
    assert "adapterd_trap" not in sys.modules


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_tuning_init_state_dict_path": "{secret}"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "{secret}"},
        {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "file://{secret}"},
        {"base_model_name_or_path": "{secret}"},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_prompt_tuning_init_state_dict_path_opens_no_file(acme: Caller, tmp_path: Path, fields: dict[str, str]) -> None:
    secret = tmp_path / "the-servers-own-secret"
    secret.write_bytes(torch_file({"prompt_embeddings": torch.zeros(3, 32)}))
    files = prompt(1)
    config = json.loads(files[CONFIG]) | {key: value.format(secret=secret) for key, value in fields.items()}
    with watched() as seen:
        response = acme.upload("reader", {**files, CONFIG: json.dumps(config).encode()})
        if response.status_code == 201:
            acme.tokens("reader")
    assert response.status_code in (201, 422)
    assert seen.mentions("the-servers-own-secret") == []


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/meta-data", "https://example.invalid/m", "file:///etc/passwd", "s3://bucket/key"]
)
def test_ssrf_a_config_that_names_a_url_makes_no_connection(acme: Caller, url: str) -> None:
    config = {"base_model_name_or_path": url, "revision": url, "task_type": "CAUSAL_LM"}
    with watched() as seen:
        response = acme.upload("caller", packed(tensors(1), **config))
    assert response.status_code == 201, response.text
    assert seen.of("socket.connect") == []
    assert seen.of("socket.getaddrinfo") == []
    assert seen.mentions(url) == []


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(.|..)+!", "(a*)*b", "((((.*)*)*)*)*x", "(x+x+)+y"])
def test_redos_rank_pattern_is_never_run_with_re(
    acme: Caller, field: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a module's name of 25 characters the first takes Python's engine seconds, and each further one doubles it."""
    real, compiled = re.compile, []

    def noted(wanted: Any, flags: int = 0) -> Any:
        compiled.append(str(wanted))
        return real(wanted, flags)

    monkeypatch.setattr(re, "compile", noted)
    response = acme.upload("slow", packed(tensors(1), **{field: {pattern: 2}}))
    assert response.status_code in (201, 422)
    assert [wanted for wanted in compiled if pattern in wanted] == []


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(?=q_proj)", "no regular expression"),
        (r"(q)\1", "no regular expression"),
        ("a{1000}{1000}", "rank_pattern"),
        ("x" * 600, "600"),
    ],
)
def test_redos_patterns_that_need_backtracking_or_too_much_memory_are_refused(acme: Caller, pattern: str, why: str) -> None:
    assert why in refusal(acme.upload("slow", packed(tensors(1), rank_pattern={pattern: 2})))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "generation_config.json"]
)
def test_jinja_templates_of_tenants_are_refused_as_files(acme: Caller, name: str) -> None:
    bomb = b"{% for i in range(10**9) %}{{ i }}{% endfor %}"
    assert name in refusal(acme.upload("templated", {**SOUND, name: bomb}))


def test_jinja_in_a_discrete_prompt_is_plain_text(acme: Caller) -> None:
    hostile = "{{ 7 * 7 }}{% set x = cycler.__init__ %}"
    config = {"peft_type": "DISCRETE_PROMPT", "template": hostile + "{input}"}
    assert acme.upload("plain", {CONFIG: json.dumps(config).encode()}).status_code == 201
    assert acme.tokens("plain", inputs=" hello") == acme.tokens(inputs=f"{hostile} hello")
    assert acme.tokens("plain", inputs=" hello") != acme.tokens(inputs="49 hello")


def test_jinja_in_a_chat_message_is_plain_text(acme: Caller) -> None:
    text = acme.house.server.app.state.services.text
    hostile = "{{ messages }}{% for i in range(10**9) %}{% endfor %}"
    assert hostile in text.chat([{"role": "user", "content": hostile}])
    body = {"model": "", "messages": [{"role": "user", "content": hostile}], "max_tokens": 2}
    assert acme.post("/v1/chat/completions", body).status_code == 200
