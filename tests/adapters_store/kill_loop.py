"""One store that is worked on by process after process, each ended by SIGKILL at a random moment.

    python -m tests.adapters_store.kill_loop TIMES

A child says over a pipe what it is about to do and what it has done; when the parent has heard enough, or the random time it
gives has passed, it kills. What was said to be done must be there; what was begun is there or is not; all else is as it was.
Prints how many changes were made and how many kills hit one in the middle, as JSON. Single-threaded, so that fork is safe.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
from pathlib import Path
from random import Random

from adapters_store.errors import NotFound
from adapters_store.store import Store

from .changes import check_whole, upload
from .conftest import in_memory

NAMES = ("support", "org/sales", "x")
LONGEST = 0.1  # seconds that a child is given at most
State = dict[str, str]  # adapter -> the text it was uploaded with; "user NAME" -> what its user goes through


def planned(state: State, random: Random) -> tuple[str, str, str]:
    """A change that the state allows: (verb, adapter, text)."""
    name = random.choice(NAMES)
    if name not in state or random.random() < 0.5:
        return "publish", name, str(random.getrandbits(64))
    return random.choice((("delete", name, ""), ("bind", name, ""), ("collect", name, "")))


def applied(state: State, verb: str, name: str, text: str) -> State:
    if verb == "delete":
        return {key: value for key, value in state.items() if key != name}
    return state | {"publish": {name: text}, "bind": {f"user {name}": name}, "collect": {}}[verb]


def make(store: Store, verb: str, name: str, text: str) -> None:
    if verb == "publish":
        upload(store, "acme", name, text, "more " * 10_000)
    elif verb == "delete":
        store.delete("acme", name)
    elif verb == "bind":
        store.bind_user("acme", f"user-{name.replace('/', '-')}", name)
    else:
        store.gc(0)


def found(store: Store) -> State:
    state: State = {}
    for name in NAMES:
        try:
            weights = store.files(store.get("acme", name).digest)["weights-0"].read_bytes()
            state[name] = weights.removeprefix(b"weights ").decode()
        except NotFound:
            pass
    return state | {f"user {user.adapter_id}": user.adapter_id for user in store.list_users("acme")[0]}


def work(root: Path, state: State, random: Random, say: int) -> None:
    """The child: changes until it is killed."""
    with Store.open(root) as store:
        while True:
            change = planned(state, random)
            os.write(say, json.dumps(["begun", *change]).encode() + b"\n")
            make(store, *change)
            state = applied(state, *change)
            os.write(say, json.dumps(["done", *change]).encode() + b"\n")


def worked(root: Path, state: State, random: Random) -> list[list[str]]:
    """What a child said until it was killed."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        work(root, state, Random(random.random()), say)
    os.close(say)
    patience, heard = random.uniform(0, LONGEST), b""
    if select.select([hear], [], [], 60)[0]:  # it has opened the store
        select.select([], [], [], patience)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while data := os.read(hear, 1 << 16):
        heard += data
    os.close(hear)
    if status != signal.SIGKILL:
        raise SystemExit(f"a child ended with status {status} after {heard!r}")
    return [json.loads(line) for line in heard.splitlines()]


def checked(root: Path, state: State, said: list[list[str]]) -> tuple[State, bool]:
    """What is there now, and whether the kill hit a change. Raises: AssertionError."""
    for verb, *change in said:
        state = applied(state, *change) if verb == "done" else state
    pending = said and said[-1][0] == "begun"
    with Store.open(root) as store:
        now = found(store)
        assert now in (state, applied(state, *said[-1][1:]) if pending else state), (now, state, said[-1:])
        check_whole(store, root)
    return now, bool(pending)


def main(times: int) -> None:
    random, state, changes, hits = Random(times), State(), 0, 0
    with tempfile.TemporaryDirectory(dir=in_memory()) as path:
        for _ in range(times):
            said = worked(Path(path), state, random)
            state, hit = checked(Path(path), state, said)
            changes += sum(verb == "done" for verb, *_ in said)
            hits += hit
    json.dump({"changes": changes, "hits": hits}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
