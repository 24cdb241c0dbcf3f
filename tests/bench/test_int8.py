"""`adapterd bench-int8` on a tiny base: figures that add up, the text it ships, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from server.bench.int8 import NEW, WINDOW, Subject, compare_int8, prose, render_int8
from server.bench.options import BenchError
from server.cli import app
from server.engine.plan import Row, Sample
from server.engine.plan import Sequence as Seq
from tests.tiny import save_servable

TEXT = "A short text, long enough to fill a window or two. " * 14


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_servable(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})


def quiet(line: str) -> None:
    """Nothing is said."""


def test_logprobs_are_those_of_the_model_itself_window_by_window(base: Path) -> None:
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    assert WINDOW < len(ids) < 2 * WINDOW
    got = Subject(base, rows=1, int8=False, say=quiet).logprobs(ids)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected: list[float] = []
    for window in (ids[:WINDOW], ids[WINDOW:]):
        scores = model(torch.tensor([window])).logits[0].detach().log_softmax(-1)
        expected += [float(scores[i, token]) for i, token in enumerate(window[1:])]
    assert got == pytest.approx(expected, abs=1e-4)


def test_the_report_compares_both_bases(base: Path) -> None:
    report = compare_int8(base, TEXT, rows=3, rounds=2, say=quiet)
    assert report.int8_bytes < report.base_bytes
    assert 0 < report.logprob_change < 0.5
    assert math.log(report.int8_perplexity / report.perplexity) == pytest.approx(0, abs=report.logprob_change)
    assert report.int8_perplexity != report.perplexity
    assert len(report.speed.rounds) == 2
    assert all(round.a > 0 < round.b for round in report.speed.rounds)


def test_rows_decode_to_their_end_beside_each_other(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(base, rows=4, int8=True, say=quiet)
    ran: list[list[int]] = []
    run = subject._runner.run

    def noted(rows: Sequence[Row]) -> dict[Seq, Sample]:
        ran.append([row.count for row in rows])
        return run(rows)

    monkeypatch.setattr(subject._runner, "run", noted)
    assert subject.tokens_per_second(list(range(3, 80)) * 4) > 0
    assert ran == [[128] * 4] + [[1] * 4] * NEW


def test_a_text_of_one_token_is_refused(base: Path) -> None:
    with pytest.raises(BenchError, match="fewer than 2 tokens"):
        compare_int8(base, "", rows=1, rounds=1, say=quiet)


def test_the_bundled_text_is_plain_prose() -> None:
    words = prose().split()
    assert len(words) > 2000
    assert prose().isascii()


def test_the_command_prints_the_report_and_keeps_it(base: Path, tmp_path: Path) -> None:
    text, kept = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text(TEXT)
    words = ["bench-int8", "--model", str(base), "--text", str(text), "--rows", "2", "--rounds", "1", "--json", str(kept)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "perplexity" in done.output
    found = json.loads(kept.read_text())
    assert found["int8_bytes"] < found["base_bytes"]
    assert len(found["speed"]["rounds"]) == 1


def test_what_is_printed_names_every_figure(base: Path) -> None:
    table = render_int8(compare_int8(base, TEXT, rows=1, rounds=1, say=quiet))
    assert [str(cell) for cell in table.columns[0].cells] == ["perplexity", "weights", "decode tokens/s"]
