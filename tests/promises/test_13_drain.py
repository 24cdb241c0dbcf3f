"""Promise 13: on SIGTERM readiness is 503 at once, requests in flight finish in the drain time, the rest end with an error
event, and the exit code is 0.

Too little time, a second signal, a signal while loading: `tests/test_serving.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Serve
from tests.process import streaming, until


def test_sigterm_turns_readiness_red_finishes_what_runs_and_exits_with_0(serve: Serve, tiny_base: Path) -> None:
    with serve("--model", str(tiny_base)) as server:
        whole = server.generate(max_new_tokens=800, ignore_eos_token=True).json()["generated_text"]
        with streaming(server, max_new_tokens=800) as stream:
            next(stream)
            server.terminate()
            until(lambda: server.http.get("/readyz").status_code == 503)
            assert server.generate().status_code == 503
            assert json.loads(list(stream)[-1])["generated_text"] == whole
        assert server.exit_code() == 0
