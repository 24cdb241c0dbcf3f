from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bench.plot import Line, along_adapters, along_rows, main, plot


def _point(rows: int, adapters: int, adapted: float, base: float) -> dict[str, Any]:
    sides = {side: {"median": value, "least": value - 1, "most": value + 1} for side, value in (("a", adapted), ("b", base))}
    return {"rows": rows, "adapters": adapters, "comparison": sides}


REPORT: dict[str, Any] = {
    "options": {
        "model": "m",
        "concurrency": 4,
        "adapters": 4,
        "families": ["lora"],
        "rank": 16,
        "prompt_tokens": 8,
        "max_new_tokens": 4,
        "repeats": 3,
    },
    "machine": {"cpus": 2, "read_gb_per_second": 15.6},
    "provenance": {"commit": None, "date": "2026-01-01T00:00:00+00:00"},
    "kernels": "native",
    "points": [_point(4, 1, 50, 60), _point(4, 4, 45, 61), _point(4, 2, 48, 60), _point(1, 1, 20, 22), _point(2, 2, 30, 35)],
}


def test_each_panel_has_its_points_in_order() -> None:
    assert [x for x, *_ in Line.of(along_adapters(REPORT), "adapters", "a").points] == [1, 2, 4]
    assert Line.of(along_rows(REPORT), "rows", "b").points == ((1, 22, 21, 23), (2, 35, 34, 36), (4, 61, 60, 62))


def test_few_adapters_are_shared_by_many_rows() -> None:
    report = {**REPORT, "options": {**REPORT["options"], "adapters": 2}}
    assert [point["rows"] for point in along_rows(report)] == [4, 1, 2]


def test_the_picture_shows_medians_and_says_where_they_come_from() -> None:
    left, right = plot(REPORT).axes
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[50, 48, 45], [60, 60, 61]]  # type: ignore[arg-type]
    assert list(right.get_lines()[0].get_xdata()) == [1, 2, 4]  # type: ignore[arg-type]
    assert "15.6 GB/s" in plot(REPORT).get_supxlabel()


def test_it_is_written_beside_the_report(tmp_path: Path) -> None:
    results = tmp_path / "sweep.json"
    results.write_text(json.dumps(REPORT))
    main(results, None)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
