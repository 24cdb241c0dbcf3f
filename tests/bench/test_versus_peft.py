from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.bench.adapters import Files, make_adapter
from server.bench.dimensions import Dimensions
from server.bench.options import BenchError, BenchOptions
from server.bench.run import bench
from server.bench.versus_peft import PeftModel
from server.bench.workload import Order, Prompt

from .fake import HIDDEN, INFO, LAYERS, WIDE, FakeServer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the fake server's dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=list(range(50)),  # half of all tokens would end a text
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _adapters(count: int) -> dict[str, Files]:
    dimensions = Dimensions.of(INFO)
    return {f"bench-{seed}": make_adapter("lora", dimensions, np.random.default_rng(seed), rank=2) for seed in range(count)}


def _orders(*adapters: str | None) -> list[Order]:
    return [Order(Prompt("", (1, 2, 3, 4)), adapter, 12) for adapter in adapters]


def test_each_row_goes_through_its_own_adapter_and_past_the_end_of_sequence(base: Path) -> None:
    adapters = _adapters(2)
    loud = {name: _louder(files) for name, files in adapters.items()}
    model = PeftModel.load(base, loud)
    mixed = model.generate(_orders("bench-0", None, "bench-1", "bench-0"))
    assert [len(row) for row in mixed.tokens] == [12] * 4
    assert len({mixed.tokens[0], mixed.tokens[1], mixed.tokens[2]}) == 3
    assert mixed.tokens[0] == mixed.tokens[3] == model.generate(_orders("bench-0")).tokens[0]
    assert mixed.seconds > 0


def _louder(files: Files) -> Files:
    """A tiny model barely hears the small values that a real one needs: alpha does it."""
    return {**files, "adapter_config.json": files["adapter_config.json"].replace(b'"lora_alpha": 4', b'"lora_alpha": 4000')}


async def test_rounds_alternate_and_both_sides_do_the_same_work(base: Path) -> None:
    server = FakeServer(info={**INFO, "threads": torch.get_num_threads()})
    options = BenchOptions(
        url="http://server",
        versus_peft=True,
        base=base,
        adapters=2,
        rank=2,
        concurrency=3,
        prompt_tokens=5,
        max_new_tokens=6,
        repeats=2,
        warmup=False,
    )
    report = await bench(options, server.transport)
    assert report.comparison is not None
    assert len(report.comparison.rounds) == 2
    assert all(round.a > 0 and round.b > 0 for round in report.comparison.rounds)
    assert report.comparison.same_tokens == 0.0  # this server says 7 to everything
    assert len(server.requests) == 2 * 3
    assert sorted(server.deleted) == sorted(server.adapters)


def test_without_peft_the_message_names_the_extra(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BenchError, match=r"adapterd\[test\]"):
        PeftModel.load(base, _adapters(1))
