from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from server.bench import machine
from server.bench.machine import Machine
from server.bench.offline import faster, powers, shapes
from server.bench.offline_report import OfflineReport
from server.bench.options import BenchError, BenchOptions
from server.bench.run import render, run_bench, to_json
from tests.tiny import tiny_model

OPTIONS = BenchOptions(offline=True, concurrency=2, adapters=2, rank=2, prompt_tokens=5, max_new_tokens=4, repeats=2, seed=7)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "_GEMM", 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(directory)
    return directory


def _run(options: BenchOptions) -> OfflineReport:
    report = run_bench(options)
    assert isinstance(report, OfflineReport)
    return report


def test_a_run_compares_adapters_with_the_base_and_the_step_with_its_floor(base: Path) -> None:
    report = _run(replace(OPTIONS, base=base))
    (point,) = report.points
    assert (point.rows, point.adapters) == (2, 2)
    assert len(point.comparison.rounds) >= 2
    assert point.comparison.ratio.least > 0
    assert point.reads.adapters > 0
    fractions = report.fractions(point)
    assert fractions["base"] == pytest.approx(report.floor(point).base / point.base.step_seconds.median)


def test_the_json_keeps_commit_machine_and_date_and_no_key(base: Path) -> None:
    kept = json.loads(to_json(_run(replace(OPTIONS, base=base, api_key="secret"))))
    assert kept["provenance"]["date"]
    assert kept["machine"]["read_gb_per_second"] > 0
    assert set(kept["points"][0]) >= {"comparison", "floor_seconds", "floor_fraction", "reads"}
    assert set(kept["points"][0]["comparison"]["ratio"]) == {"median", "least", "most"}
    assert "secret" not in json.dumps(kept)


def test_the_tables_name_the_machine_and_the_ratio(base: Path) -> None:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(render(_run(replace(OPTIONS, base=base))))
    text = console.export_text()
    assert "GB/s" in text
    assert "of fp32 floor" in text
    assert "foreign CPUs" in text


@pytest.mark.parametrize("families", [("lora", "ia3", "bitfit"), ("prefix_tuning", "p_tuning", "trainable_tokens")])
def test_rows_of_different_families_share_a_batch(base: Path, families: tuple[str, ...]) -> None:
    options = replace(OPTIONS, base=base, concurrency=3, adapters=3, families=families, repeats=1, virtual_tokens=3)  # type: ignore[arg-type]
    assert _run(options).points[0].adapters == 3


def test_the_precision_asked_for_decides_how_lora_is_held(base: Path) -> None:
    sizes = {precision: _run(replace(OPTIONS, base=base, precision=precision, repeats=1)) for precision in ("bf16", "fp32")}
    held = {name: report.points[0].reads.adapters for name, report in sizes.items()}
    assert held["fp32"] == 2 * held["bf16"]


def test_a_sweep_goes_by_powers_of_two_and_measures_nothing_twice() -> None:
    sweep = replace(OPTIONS, sweep=True, concurrency=6, adapters=6)
    assert shapes(sweep) == [(6, 1), (6, 2), (6, 4), (6, 6), (1, 1), (2, 2), (4, 4)]
    assert shapes(replace(sweep, adapters=2)) == [(6, 1), (6, 2), (1, 1), (2, 2), (4, 2)]
    assert shapes(replace(sweep, sweep=False)) == [(6, 6)]
    assert shapes(replace(OPTIONS, popularity="identical")) == [(2, 1)]
    assert shapes(replace(OPTIONS, adapters=0)) == [(2, 0)]


def test_powers_end_with_what_was_asked_for() -> None:
    assert powers(1) == [1]
    assert powers(8) == [1, 2, 4, 8]
    assert powers(5) == [1, 2, 4, 5]


def test_the_faster_of_two_measurements_counts() -> None:
    one, other = Machine(2, 7.0, 200.0, 0.5), Machine(2, 9.0, 100.0, 3.0)
    assert faster(one, other) == Machine(2, 9.0, 200.0, 0.5)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (BenchOptions(offline=True, scenario="many-adapters"), "offline"),
        (BenchOptions(offline=True, versus_peft=True), "offline"),
        (BenchOptions(offline=True, popularity="zipf"), "popularity"),
        (BenchOptions(sweep=True), "sweep"),
    ],
)
def test_what_does_not_go_with_it_is_named(options: BenchOptions, field: str) -> None:
    with pytest.raises(BenchError, match=f"`{field}`"):
        run_bench(options)
