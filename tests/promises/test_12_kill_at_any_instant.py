"""Promise 12: killed at any instant, every catalog row has its bytes, and nothing half-written is visible.

At every named point of the store: `tests/adapters_store/test_crash.py` and its neighbours.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from adapters_store.store import Store
from tests.process import environment

PUBLISH_FOREVER = """
import itertools, os, sys
from pathlib import Path
from adapters_store.store import Store

with Store.open(Path(sys.argv[1])) as store:
    for number in itertools.count(1):
        with store.stage() as staged:
            staged.write("adapter_config.json", [b"%d" % number])
            staged.write("adapter_model.safetensors", [os.urandom(200_000)])
            store.publish(staged, tenant="acme", name="a", method="lora", parts=(), details={})
        print(number, flush=True)
"""


def test_after_kill_9_what_was_acknowledged_is_there_whole_and_nothing_else_is_half_there(tmp_path: Path) -> None:
    root, acknowledged = tmp_path / "store", 0
    for life in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISH_FOREVER, str(root)], stdout=subprocess.PIPE, text=True, env=environment()
        ) as process:
            assert process.stdout is not None
            for _ in range(2 + life):
                assert process.stdout.readline().strip()
                acknowledged += 1
            process.send_signal(signal.SIGKILL)
            acknowledged += len(process.stdout.read().split())
        with Store.open(root) as store:
            versions = store.versions("acme", "a")
            assert len(versions) in (acknowledged, acknowledged + 1), "the last may have been killed on its way to be told"
            acknowledged = len(versions)
            assert store.verify() == ()
            for record in versions:
                assert sorted(store.files(record.digest)) == ["adapter_config.json", "adapter_model.safetensors"]
