"""Names as weapons: no name of an adapter, file, user or request becomes a path, a line of a log, or another's header."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.e2e.uploads import lora
from tests.house import Caller
from tests.logged import logged
from tests.security.conftest import refusal
from tests.security.contents import CONFIG, WEIGHTS
from tests.security.watch import watched

SOUND = lora(1)
TRAVERSALS = (
    "../escape", "..", ".", "/etc/passwd", "a/../../b", "a//b", "./a", "a/.", "..\\escape", "C:\\x", "a\0b",
    "%2e%2e/escape", "....//escape", "~/escape", "a/" + "b/" * 80 + "c",
)  # fmt: skip
CONTROLS = (
    'x\n{"level":"error","event":"forged"}', "x\r\nset-cookie: a=b", "\x1b[2Jcleared", "\u202egnp.exe", "a\u200bb",
    "\u0430dmin", "a\tb", "a b", "\ufeffa", "\x7f", "é", "😀", "a;b", "a'b", 'a"b', "a$(id)", "a`id`", "a|b", "a*",
    "{{7*7}}", "%s%n", "", "x" * 129,
)  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
def test_path_traversal_in_adapter_ids_is_refused(acme: Caller, name: str) -> None:
    root = acme.house.store_root
    around = {path for path in root.parent.rglob("*") if root not in path.parents}
    with watched() as seen:
        assert "adapter_id" in refusal(acme.upload(name, SOUND))
    assert {path for path in root.parent.rglob("*") if root not in path.parents} == around
    assert not [opened for opened in seen.of("open") if "escape" in opened or "passwd" in opened]


@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_path_traversal_in_addresses_reaches_no_file(acme: Caller, method: str, name: str) -> None:
    with watched() as seen:
        for prefix in ("/adapters/", "/users/", "/v1/models/", "/docs/static/"):
            for path in (quote(name, safe=""), quote(name, safe="/.")):
                assert acme.ask(method, prefix + path).status_code in (200, 307, 404, 405, 422), (prefix, path)
    assert not [opened for opened in seen.of("open") if "escape" in opened or "passwd" in opened]


@pytest.mark.parametrize(
    "name",
    [
        "../adapter_config.json",
        "a/b/c.json",
        "/etc/cron.d/x",
        "..",
        "a\\b",
        "x\0.json",
        "con\n.json",
        "\u202enosj",
        "a" * 300,
        "{0}",
    ],
)
def test_path_traversal_in_file_names_is_refused(acme: Caller, name: str) -> None:
    root = acme.house.store_root
    refusal(acme.upload("walker", {CONFIG: SOUND[CONFIG], WEIGHTS: SOUND[WEIGHTS], name: b"{}"}), 400, 422)
    assert {path.name for path in root.parent.iterdir()} == {path.name for path in root.parent.iterdir()} - {"escape"}


def test_every_file_of_the_store_is_named_by_a_digest_or_a_counter(acme: Caller) -> None:
    """After uploads under the wildest names that are allowed."""
    for name in ("org/model:v1", "a.b-c_d", "CON", "nul", "index", "-rf", ".hidden", "catalog.sqlite3"):
        assert acme.upload(name, SOUND).status_code in (200, 201)
        assert acme.put(f"/users/{quote('bob@example.org')}", {"adapter_id": name}).status_code == 200
    root = acme.house.store_root
    for path in (path for path in root.rglob("*") if path.is_file()):
        shown = path.relative_to(root).as_posix()
        assert re.fullmatch(
            r"catalog\.sqlite3(-\w+)?|blobs/sha256/[0-9a-f]{2}/[0-9a-f]{62}|(staging|cache)/.*|\.?lock", shown
        ), shown
    acme.delete("/users/bob@example.org")


@pytest.mark.parametrize("name", CONTROLS)
def test_unicode_and_control_characters_in_names_are_refused(acme: Caller, name: str) -> None:
    """Also look-alikes: a Cyrillic letter makes another name that reads the same."""
    words = refusal(acme.upload(name, SOUND))
    assert words.isprintable() or name not in words
    refusal(acme.put(f"/users/{quote(name, safe='') or '%20'}", {"adapter_id": "x"}), 404, 405, 422)


@pytest.mark.parametrize("name", CONTROLS)
def test_log_injection_forges_no_line_and_no_header(acme: Caller, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = name.encode("utf-8").replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
    with logged(capsys):
        answers = [
            acme.upload(name, SOUND),
            acme.generate(adapter=name or "x"),
            acme.get(f"/adapters/{quote(name or 'x', safe='')}"),
            acme.post("/generate", {"inputs": name or "x", "user_id": name, "parameters": {"max_new_tokens": 1}}),
            acme.get("/livez", headers={"x-request-id": header}),
            acme.upload("fine", {**SOUND, f"{name or 'x'}.json": b"{}"}),
        ]
    for answer in answers:
        assert "set-cookie" not in answer.headers
        assert re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", answer.headers["x-request-id"])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if line.get("event") == "forged"] == []


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """Or none of these tests could fail."""
    with watched() as seen:
        (tmp_path / "escape").touch()
        (tmp_path / "escape").open().close()
        __import__("colorsys")
    assert seen.mentions("escape")
    assert seen.of("open")
