"""Every promise has its file, and in it at least one test."""

from __future__ import annotations

import ast
from pathlib import Path

PROMISES = {
    1: "tenant_isolation",
    2: "content_addressing",
    3: "prefix_reuse",
    4: "batch_mates",
    5: "no_code_from_uploads",
    6: "limits_before_allocation",
    7: "quotas",
    8: "logs",
    9: "metrics",
    10: "exposure",
    11: "api_keys",
    12: "kill_at_any_instant",
    13: "drain",
    14: "disconnects",
    15: "failures_stay_where_they_are",
}


def test_every_one_of_the_fifteen_promises_has_a_file_with_tests() -> None:
    here = Path(__file__).parent
    named = {f"test_{number:02}_{name}.py" for number, name in PROMISES.items()}
    assert {path.name for path in here.glob("test_[0-9]*.py")} == named
    assert sorted(PROMISES) == list(range(1, 16))
    for name in named:
        functions = [node for node in ast.walk(ast.parse((here / name).read_text())) if isinstance(node, ast.FunctionDef)]
        assert [function for function in functions if function.name.startswith("test_")], name
