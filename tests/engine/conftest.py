"""Fixtures for tests of a whole engine: engines that are stopped, what each adapter answers alone, and what was logged.

Everything heavy is imported inside the fixtures, so that tests of the scheduler's half start without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

if TYPE_CHECKING:
    from tests.engine.running import Running


@pytest.fixture(scope="module")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """What the engine logged; failures are provoked here by the dozen, and printing them all takes seconds."""
    with capture_logs() as captured:
        yield captured


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What each adapter answers to PROMPT, alone."""
    from tests.engine.running import ADAPTERS, DIGESTS, PROMPT, new_lab

    found = {}
    for name in ["base", *ADAPTERS]:
        lab = new_lab()
        lab.submit(name, PROMPT, *([] if name == "base" else [DIGESTS[name]]))
        lab.run()
        found[name] = lab.tokens(name)
    assert len({tuple(tokens) for tokens in found.values()}) == len(found)
    return found


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    """Makes started engines; at the end they are stopped and must have ended every request exactly once."""
    from tests.engine.running import Running, check_events

    made: list[Running] = []

    def make(*args: Any, start: bool = True, **options: Any) -> Running:
        made.append(Running(*args, **options))
        if start:
            made[-1].engine.start()
        return made[-1]

    yield make
    for running in made:
        running.engine.stop()
        assert not running.engine._thread.is_alive()
        assert running.engine.pending == 0
        check_events(running.events)
        running.scheduler.check_idle()
