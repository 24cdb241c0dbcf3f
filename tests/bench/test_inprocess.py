from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from server.bench.adapters import Files, make_adapter
from server.bench.dimensions import Dimensions
from server.bench.inprocess import EngineUnderTest
from server.bench.options import FAMILIES, BenchError, Family
from server.errors import AdapterError
from tests.tiny import tiny_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module", params=[True, False], ids=["native", "torch"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(directory)
    threads = torch.get_num_threads()
    loaded = EngineUnderTest.load(directory, rows=3, tokens=40, slots=12, threads=threads, native=request.param)
    with loaded as engine:
        yield engine


def _loud(family: Family, dimensions: Dimensions, seed: int = 0) -> Files:
    """A tiny model barely hears the small values that a real one needs: alpha does it."""
    files = make_adapter(family, dimensions, np.random.default_rng(seed), rank=4, virtual_tokens=6)
    return {**files, "adapter_config.json": files["adapter_config.json"].replace(b'"lora_alpha": 8', b'"lora_alpha": 4096')}


def test_a_batch_has_its_tokens_and_its_clock(engine: EngineUnderTest) -> None:
    batch = engine.generate(PROMPTS, [None] * 3, new=6)
    assert [len(row) for row in batch.tokens] == [6] * 3
    assert len(batch.step_seconds) == 5  # the first token of each row comes with its prefill
    assert 0 < batch.prefill_seconds < batch.seconds
    assert batch.tokens_per_second == pytest.approx(18 / batch.seconds)


def test_every_row_goes_through_its_own_adapter(engine: EngineUnderTest) -> None:
    engine.add({name: _loud("lora", engine.dimensions, seed) for seed, name in enumerate(("one", "two"))})
    same = [PROMPTS[0]] * 3
    base, one, two = engine.generate(same, [None, "one", "two"], new=8).tokens
    assert len({base, one, two}) == 3
    assert engine.generate(same, ["one", None, "one"], new=8).tokens == (one, base, one)
    assert engine.adapter_bytes("one") > 0


def test_every_family_the_bench_makes_runs_in_one_engine(engine: EngineUnderTest) -> None:
    families: list[Family] = list(FAMILIES)  # type: ignore[arg-type]  # the names of that very Literal
    engine.add({family: _loud(family, engine.dimensions) for family in families})
    for start in range(0, len(families), 3):
        names = families[start : start + 3]
        batch = engine.generate(PROMPTS[: len(names)], names, new=3)
        assert [len(row) for row in batch.tokens] == [3] * len(names)


def test_a_step_reads_the_layers_and_the_head_and_no_embedding(engine: EngineUnderTest) -> None:
    model = tiny_model("llama")
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    held, as_fp32 = engine.step_bytes()
    assert as_fp32 == 4 * sum(module.weight.numel() for module in linears)
    assert held >= as_fp32  # these weights are no bf16, and packing may pad them


def test_a_row_that_fails_is_an_error_of_the_bench(engine: EngineUnderTest) -> None:
    with pytest.raises(BenchError, match="a row failed"):
        engine.generate([[5] * 400], [None], new=4)


def test_an_adapter_that_does_not_fit_is_refused(engine: EngineUnderTest) -> None:
    files = make_adapter("lora", engine.dimensions, np.random.default_rng(0), rank=4)
    with pytest.raises(AdapterError, match="adapter_config"):
        engine.add({"broken": {name: body for name, body in files.items() if name != "adapter_config.json"}})


def test_dimensions_of_the_base_here_are_those_a_server_would_tell(engine: EngineUnderTest) -> None:
    dimensions, shape = engine.dimensions, engine.base.shape
    assert dimensions.embedding == "model.embed_tokens"
    assert {linear.name for linear in dimensions.linears} == {
        name for name, module in shape.modules.items() if module.kind == "linear" and name != "lm_head"
    }
    assert [(exit_.layer, exit_.module) for exit_ in dimensions.exits] == [(s.layer, s.exit) for s in shape.sublayers]
