from __future__ import annotations

from math import isnan, nan

import pytest

from server.bench.figures import Figure, Verdict
from server.bench.report import _goal, _verdict


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure("p50", 3.0, "s"), None),
        (Figure("lost", 0.05, "share", most=0.05), True),
        (Figure("lost", 0.051, "share", most=0.05), False),
        (Figure("kept", 0.8, "ratio", least=0.8), True),
        (Figure("kept", 0.79, "ratio", least=0.8), False),
        (Figure("off by", -0.06, "share", least=-0.05, most=0.05), False),
        (Figure("off by", 0.04, "share", least=-0.05, most=0.05), True),
        (Figure("of nothing", nan, "s", most=1.0), False),
    ],
)
def test_a_figure_meets_its_goal_or_not(figure: Figure, met: bool | None) -> None:
    assert figure.met is met


def test_over_rounds_it_is_the_median_with_its_spread() -> None:
    found = Figure.over("ratio", [0.7, 0.9, 0.8], "ratio", least=0.75)
    assert (found.value, found.met) == (0.8, True)
    assert found.spread is not None
    assert (found.spread.least, found.spread.most) == (0.7, 0.9)
    assert isnan(Figure.over("ratio", [], "ratio").value)


def test_a_verdict_is_met_when_no_goal_is_missed() -> None:
    met, told, missed = Figure("a", 1, "count", most=1), Figure("b", 1, "count"), Figure("c", 1, "count", most=0)
    assert Verdict("all", (met, told)).met
    assert not Verdict("all", (met, told, missed)).met


def test_every_unit_is_shown_as_people_read_it() -> None:
    units = {"s": "1250.0 ms", "share": "125.0%", "tokens/s": "1.2 tok/s", "ratio": "1.25", "count": "1"}
    table = _verdict(Verdict("units", tuple(Figure(unit, 1.25, unit) for unit in units)))  # type: ignore[arg-type]
    assert list(table.columns[1].cells) == list(units.values())
    assert _goal(Figure("off by", 0.0, "share", least=-0.05, most=0.05)) == "at least -5.0%, at most 5.0%"
    assert list(_verdict(Verdict("none", (Figure("nothing", nan, "s", most=1.0),))).columns[1].cells) == ["-"]
