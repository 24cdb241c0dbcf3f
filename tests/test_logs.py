"""Logs: one line per event on stderr, the same for structlog and the standard library, and no values of variables."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

import pytest
import structlog

from server.logs import configure

Style = Literal["auto", "json", "console"]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = before


def log_in(level: str, style: Style = "json") -> Any:
    configure(level, style)
    return structlog.get_logger("test")


def lines(captured: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, err = captured.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def fail_with_a_secret() -> None:
    prompt = "my secret prompt"
    raise ValueError(f"{len(prompt)} characters")


def test_a_line_is_json_with_event_level_time_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log_in("info").info("adapter loaded", digest="9f2c", seconds=0.5)
    (line,) = lines(capsys)
    assert line.keys() == {"event", "level", "timestamp", "digest", "seconds"}
    assert (line["event"], line["level"], line["digest"], line["seconds"]) == ("adapter loaded", "info", "9f2c", 0.5)
    assert datetime.fromisoformat(line["timestamp"]).utcoffset() is not None


def test_bound_context_is_on_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("info")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.info("inside")
    log.info("outside")
    inside, outside = lines(capsys)
    assert inside["request_id"] == "r1"
    assert "request_id" not in outside


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)],
)
def test_only_lines_of_the_level_and_above_are_written(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in(level)
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)(name)
    assert len(lines(capsys)) == shown


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("library", ["structlog", "logging"])
@pytest.mark.filterwarnings("error")
def test_a_traceback_has_no_local_variables(style: Style, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("info", style)
    try:
        fail_with_a_secret()
    except ValueError:
        (log if library == "structlog" else logging.getLogger("uvicorn.error")).exception("it broke")
    out, err = capsys.readouterr()
    assert out == ""
    assert "it broke" in err
    assert "ValueError: 16 characters" in err
    assert "in fail_with_a_secret" in err
    assert "my secret prompt" not in err.replace('prompt = "my secret prompt"', "")


@pytest.mark.parametrize("style", ["json", "console"])
def test_an_error_given_as_a_value_is_written_with_its_cause(style: Style, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("info", style)
    try:
        try:
            fail_with_a_secret()
        except ValueError as cause:
            raise OSError("unreadable") from cause
    except OSError as error:
        caught = error
    log.error("load failed", exc_info=caught)
    log.warning("no cause", exc_info=None)
    err = capsys.readouterr().err
    assert "ValueError: 16 characters" in err
    assert "OSError: unreadable" in err
    assert "no cause" in err


def test_a_json_traceback_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("info")
    try:
        fail_with_a_secret()
    except ValueError:
        log.exception("it broke")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "fail_with_a_secret" in line["exception"]


def test_the_standard_librarys_lines_look_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    logging.getLogger("uvicorn.error").warning("bad request from %s", "127.0.0.1")
    (line,) = lines(capsys)
    assert line.keys() == {"event", "level", "timestamp"}
    assert (line["event"], line["level"]) == ("bad request from 127.0.0.1", "warning")


def test_libraries_may_not_chatter_below_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug", "json")
    logging.getLogger("transformers").info("loading weights from /some/path")
    assert lines(capsys) == []


def test_configuring_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    configure("info", "json")
    logging.getLogger("x").error("once")
    structlog.get_logger().error("once too")
    assert len(lines(capsys)) == 2


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_colours_on_a_terminal_and_json_elsewhere(
    terminal: bool, is_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    log_in("info", "auto").info("hello")
    err = capsys.readouterr().err
    assert err.startswith("{") is is_json
    assert "hello" in err
