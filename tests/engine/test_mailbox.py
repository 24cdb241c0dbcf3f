"""The way from the engine's thread to the event loop, and how the events of one request or of several are waited for."""

from __future__ import annotations

import asyncio

from server.engine.mailbox import Events, Mailbox
from server.requests import Event


async def test_events_published_before_anybody_listens_are_kept() -> None:
    mailbox, seen = Mailbox(), list[str]()
    mailbox.publish([Event("a"), Event("b")])
    mailbox.attach(asyncio.get_running_loop(), lambda event: seen.append(event.request_id))
    await asyncio.sleep(0)
    assert seen == ["a", "b"]


def test_publishing_to_a_closed_loop_is_no_error() -> None:
    mailbox, loop = Mailbox(), asyncio.new_event_loop()
    mailbox.attach(loop, lambda event: None)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    mailbox.publish([Event("a")])


async def test_what_has_come_is_not_waited_for() -> None:
    events = Events()
    events.put(Event("a"))
    events.put(None)
    for expected in (Event("a"), None):
        await asyncio.wait_for(events.wait(), 10)
        assert events.take() == expected
    assert not events


async def test_nothing_is_waited_for() -> None:
    events = Events()
    events.put(Event("a"))
    events.take()
    waiting = asyncio.ensure_future(events.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    events.put(Event("b"))
    await asyncio.wait_for(waiting, 10)


async def test_several_are_waited_for_together() -> None:
    first, second, arrived = Events(), Events(), asyncio.Event()
    first.arrived = second.arrived = arrived
    second.put(Event("b"))
    await asyncio.wait_for(arrived.wait(), 10)
    assert (bool(first), bool(second)) == (False, True)
