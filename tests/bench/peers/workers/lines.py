"""A worker's half of the wire: one JSON object per line in, one per line out. Standard library only.

{"op": "load", "base": DIR, "adapters": {NAME: DIR}, "rows": 8, "tokens": 200, "threads": 2}  -> {"version": "..."}
{"op": "generate", "prompts": [[id, ...]], "texts": [...], "adapters": [NAME or null], "new": 64}
                                                                -> {"seconds": 1.5, "tokens": [[id, ...]]}
anything that raises                                            -> {"error": "..."}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

Names = list["str | None"]
Rows = list[list[int]]


class Peer(Protocol):
    """What a worker script brings: made by its `load`, then asked for batch after batch."""

    version: str

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        """(seconds, the `new` tokens of each row), greedy and past the end-of-sequence token."""
        ...


def serve(load: Callable[..., Peer]) -> None:
    """Answers requests until stdin ends. What libraries print goes to stderr: stdout belongs to the protocol."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        op = request.pop("op")
        try:
            if op == "load":
                peer = load(**request)
                answer: dict[str, Any] = {"version": peer.version}
            else:
                assert peer is not None, "load comes first"
                answer = dict(zip(("seconds", "tokens"), peer.generate(**request), strict=True))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """with stopwatch() as seconds: work(); seconds() is how long the work took."""
    begun = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0] - begun
    ended.append(time.perf_counter())
