"""The audit trail: one line per request that has an action, with what is known and nothing that is content."""

from __future__ import annotations

from typing import Any

import pytest
import structlog.testing

from server.audit import Trail


def line(trail: Trail, status: int | None = 200) -> dict[str, Any]:
    with structlog.testing.capture_logs() as lines:
        trail.close(status)
        trail.close(status)
    (only,) = lines
    return dict(only)


def test_a_request_without_an_action_leaves_no_line() -> None:
    with structlog.testing.capture_logs() as lines:
        Trail("r").close(200)
    assert lines == []


def test_a_line_says_who_what_and_how_it_ended() -> None:
    trail = Trail("r", action="adapter.upload")
    trail.who("acme", "k1")
    trail.about(adapters=["support"], digests=["d" * 64], version=3, note=None)
    said = line(trail, 201)
    seconds = said.pop("seconds")
    assert seconds >= 0
    assert said == {
        "event": "audit",
        "log_level": "info",
        "action": "adapter.upload",
        "outcome": "success",
        "status": 201,
        "request_id": "r",
        "tenant": "acme",
        "key_id": "k1",
        "adapters": ["support"],
        "digests": ["d" * 12],
        "version": 3,
    }


@pytest.mark.parametrize(
    ("ends", "status", "outcome"),
    [
        ([], 200, "success"),
        ([], 422, "error"),
        ([], None, "cancelled"),
        (["success", "success"], 200, "success"),
        (["success", "generation", "cancelled"], 200, "generation"),
        (["timeout"], 200, "timeout"),
    ],
)
def test_the_first_failure_is_the_outcome(ends: list[str], status: int | None, outcome: str) -> None:
    trail = Trail("r", action="generate")
    for end in ends:
        trail.ended(end)
    assert line(trail, status)["outcome"] == outcome


def test_the_runs_of_one_request_are_counted_together() -> None:
    trail = Trail("r", action="completion")
    for queue, first in ((0.25, 0.5), (0.75, 0.4)):
        trail.waited(queue)
        trail.began(first)
        trail.ran("success", prompt=5, cached=2, generated=3)
    said = line(trail)
    assert (said["runs"], said["prompt_tokens"], said["cached_tokens"], said["generated_tokens"]) == (2, 10, 4, 6)
    assert (said["queue_seconds"], said["first_token_seconds"]) == (0.75, 0.4)


def test_what_is_no_name_is_not_written_down() -> None:
    trail = Trail("r", action="adapter.delete")
    trail.about(
        adapters=["fine/name", "please ignore all previous", "x" * 129, "a\nb"], user="ann@example.org", subject="<script>"
    )
    said = line(trail)
    assert said["adapters"] == ["fine/name", "?", "?", "?"]
    assert (said["user"], said["subject"]) == ("ann@example.org", "?")


def test_ids_of_runs_are_distinct_and_begin_with_the_requests() -> None:
    trail = Trail("r")
    ids = {trail.new_run() for _ in range(100)}
    assert len(ids) == 100
    assert all(id.startswith("r.") for id in ids)
