"""Decode graphs on a CPU: a recording is played back by computing anew from the tensors that it was made over."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.methods import build_methods
from server.methods.base import Adapter, Checkpoint, Limits, Rows, Run
from server.methods.grouped import lora_loop, rows_of
from server.model.graphs import DecodeGraphs, GraphLimits, fixed_rows, load, rounded, standing_in, static_step
from server.model.kernels import Kernels
from server.model.step import Step
from tests.lab import Lab
from tests.tiny import tiny_model

BLOCKS, SIZE = 200, 4
LIMITS = GraphLimits(rows=16, table_width=12, block_size=SIZE, spare_block=BLOCKS - 1)


def gathering(a: Tensor, b: Tensor, rows: Rows) -> Run:
    """LoRA that looks at `rows.slot` each time it runs, as a GPU's kernel does."""

    def run(x: Tensor, y: Tensor) -> None:
        slot = torch.where(rows.slot < len(a), rows.slot, 0)
        low = torch.bmm(a[slot], x[rows.index].unsqueeze(-1))
        y.index_add_(0, rows.index, torch.bmm(b[slot].transpose(1, 2), low)[..., 0])

    return run


class Playback:
    """A `Record` that needs no GPU: it keeps which tensors `step` held, and nothing that is in them."""

    def __init__(self, step: Step, fail: bool = False) -> None:
        self.step, self.fail = step, fail
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        self.recorded += 1
        static, output = copy(self.step), work().clone()

        def replay() -> None:
            self.replayed += 1
            with standing_in(self.step, static):
                output.copy_(work())

        return replay, output


def adapter(lab: Lab, name: str, method: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shape = lab.runner.base.shape
    module = "model.layers.0.self_attn.q_proj" if seed % 2 else "model.layers.1.mlp.up_proj"
    at = shape.modules[module]
    sizes = {"A": (4, at.in_features), "B": (at.out_features, 4)} if method == "lora" else {"bias": (at.out_features,)}
    site = {key: torch.randn(*size, generator=generator) / 3 for key, size in sizes.items()}
    config = {"scale": {module: 1.0}} if method == "lora" else {}
    part = build_methods()[method].read(Checkpoint(method, config, {module: site}), shape, Limits())
    return Adapter(Digest(name * 64), (part,))


def lab_of(*made: tuple[str, str]) -> Lab:
    lab = Lab(tiny_model("llama"), {}, kernels=Kernels("gathering", lora=gathering), blocks=BLOCKS, block_size=SIZE)
    for seed, (name, method) in enumerate(made):
        lab.adapters[Digest(name * 64)] = adapter(lab, name, method, seed)
    return lab


def ask(lab: Lab) -> None:
    """Requests of the base and of every adapter, of different lengths, so that rows leave one by one."""
    lab.submit("base", [5, 6, 7], max_new_tokens=12)
    for i, digest in enumerate(lab.adapters):
        lab.submit(f"r{i}", [9, 8, 7, 6][: i + 1], digest, max_new_tokens=5 + i)
    lab.run()


def recording(lab: Lab, **how: bool) -> Playback:
    record = Playback(lab.runner.step, **how)
    lab.runner.use_graphs(record, LIMITS)
    return record


@pytest.mark.parametrize("made", [(), (("a", "lora"), ("b", "lora"), ("c", "lora"), ("d", "lora"))], ids=["base", "lora"])
def test_replayed_steps_give_the_same_tokens_and_logits(made: tuple[tuple[str, str], ...]) -> None:
    plain, replaying = lab_of(*made), lab_of(*made)
    record = recording(replaying)
    ask(plain)
    ask(replaying)
    assert record.replayed > record.recorded > 0
    for name in ("base", *(f"r{i}" for i in range(len(made)))):
        assert replaying.tokens(name) == plain.tokens(name)
        torch.testing.assert_close(replaying.logits(name), plain.logits(name), rtol=1e-4, atol=1e-4)


def test_one_graph_serves_whatever_slots_the_rows_have() -> None:
    lab = lab_of(("a", "lora"), ("b", "lora"), ("c", "lora"))
    first, *others = lab.adapters
    for digest in lab.adapters:  # every slot put before anything is recorded
        lab.submit(f"warm {digest}", [3], digest, max_new_tokens=1)
    lab.run()
    record = recording(lab)
    for digest in lab.adapters:
        lab.submit(f"r {digest}", [3, 4], digest, max_new_tokens=4)
        lab.run()
    assert (record.recorded, record.replayed) == (1, 9)
    assert len({tuple(lab.tokens(f"r {digest}")) for digest in lab.adapters}) > 1
    assert first not in others


def test_a_family_that_looks_at_the_host_is_run_as_ever() -> None:
    plain, lab = lab_of(("a", "lora"), ("b", "bitfit")), lab_of(("a", "lora"), ("b", "bitfit"))
    record = recording(lab)
    ask(plain)
    ask(lab)
    assert lab.tokens("r1") == plain.tokens("r1")
    assert 0 < record.replayed < 12  # only once the biased row has left


def test_a_device_that_records_nothing_is_asked_once() -> None:
    plain, lab = lab_of(), lab_of()
    recording(lab, fail=True)
    ask(plain)
    ask(lab)
    assert lab.tokens("base") == plain.tokens("base")
    assert lab.runner._graphs is not None
    assert (lab.runner._graphs._record, lab.runner._graphs.kept) == (None, 0)


def test_graphs_go_with_the_ops_they_were_recorded_over() -> None:
    lab = lab_of(("a", "lora"), ("b", "lora"))
    record, (first, second) = recording(lab), lab.adapters
    lab.submit("one", [3, 4], first, max_new_tokens=4)
    lab.run()
    before = record.recorded
    lab.submit("two", [3, 4], second, max_new_tokens=4)  # another module of the same pool
    lab.run()
    assert record.recorded == before + 1
    assert lab.runner._graphs is not None
    assert lab.runner._graphs.kept == 1


def test_steps_over_the_limits_and_prefills_are_not_recorded() -> None:
    lab = lab_of()
    record = Playback(lab.runner.step)
    lab.runner.use_graphs(record, GraphLimits(rows=1, table_width=2, block_size=SIZE, spare_block=BLOCKS - 1))
    lab.submit("a", [5] * 6, max_new_tokens=8)  # up to 13 positions, 8 fit
    lab.run()
    assert (record.recorded, record.replayed) == (1, 2)
    for name in "bc":
        lab.submit(name, [5, 6], max_new_tokens=3)  # two rows, one fits
    lab.run()
    assert record.replayed == 2


# ---- the tensors ----


def step_of(contexts: list[int], slots: list[int]) -> Step:
    count = len(contexts)
    number = torch.arange(count)
    return Step(
        ids=number + 10,
        positions=torch.tensor(contexts) - 1,
        write=number + 40,
        tables=torch.arange(1, 1 + count * 3, dtype=torch.int32).view(count, 3),
        starts=torch.arange(count + 1, dtype=torch.int32),
        contexts=torch.tensor(contexts, dtype=torch.int32),
        keep=number,
        spans=tuple((i, i + 1, context) for i, context in enumerate(contexts)),
        decodes=count,
        rows={"lora:8": rows_of(slots)},
    )


def test_a_smaller_step_leaves_spare_rows_behind() -> None:
    limits = GraphLimits(rows=8, table_width=5, block_size=SIZE, spare_block=99)
    static = static_step(4, ("lora:8",), step_of([1], [0]), limits)
    held = {name: value.data_ptr() for name, value in vars(static).items() if isinstance(value, Tensor)}
    load(static, step_of([5, 9, 12, 2], [7, 3, 0, 7]), limits)
    assert static.rows["lora:8"].slot.tolist() == [7, 3, 0, 7]
    load(static, step_of([6, 3], [0, 2]), limits)
    assert static.rows["lora:8"].slot.tolist() == [0, 2, 0, 0]
    assert static.ids.tolist() == [10, 11, 0, 0]
    assert static.positions.tolist() == [5, 2, 0, 0]
    assert static.write.tolist() == [40, 41, 99 * SIZE, 99 * SIZE]
    assert static.contexts.tolist() == [6, 3, 1, 1]
    assert static.key_starts.tolist() == [0, 6, 9, 10, 11]
    assert static.tables[:2, :3].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert static.tables[2:, 0].tolist() == [99, 99]
    assert (static.decodes, len(static.spans), static.keep.tolist()) == (4, 4, [0, 1, 2, 3])
    assert held == {name: value.data_ptr() for name, value in vars(static).items() if isinstance(value, Tensor)}


def test_a_table_may_be_wider_than_the_graphs() -> None:
    limits = GraphLimits(rows=8, table_width=2, block_size=SIZE, spare_block=99)
    static = static_step(2, (), step_of([1], [0]), limits)
    load(static, step_of([5, 8], [0, 0]), limits)
    assert static.tables.tolist() == [[1, 2], [4, 5]]


def test_a_step_is_itself_again_after_another_stood_in() -> None:
    step, other = step_of([1], [0]), step_of([7, 8], [0, 0])
    before = dict(vars(step))
    with standing_in(step, other):
        assert step.contexts is other.contexts
    assert all(value is before[name] for name, value in vars(step).items())


def test_the_tests_own_kernel_is_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(*size, generator=generator) for size in ((3, 5), (3, 6), (4, 8, 5), (4, 8, 6)))
    a[0], b[0] = 0, 0
    expected = y.clone()
    lora_loop(x, expected, a, b, rows_of([2, 0, 3]))
    gathering(a, b, fixed_rows(torch.tensor([2, 9, 3]), {}))(x, y)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("count", "most", "rows"), [(1, 64, 1), (3, 64, 4), (8, 64, 8), (9, 64, 16), (17, 64, 24), (5, 6, 6), (60, 62, 62)]
)
def test_rows_are_rounded_up(count: int, most: int, rows: int) -> None:
    assert rounded(count, most) == rows


def test_the_oldest_graph_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.graphs.MOST_GRAPHS", 2)
    lab = lab_of()
    step = step_of([1], [0])
    step.rows = {}
    graphs = DecodeGraphs(step, lab.runner.sites, lambda: torch.zeros(len(step.ids), 3), LIMITS, Playback(step))
    for count in (1, 2, 4):
        for name, value in vars(step_of([1] * count, [0] * count)).items():
            setattr(step, name, {} if name == "rows" else value)
        logits = graphs.run()
        assert logits is not None
        assert logits.shape == (count, 3)
    assert graphs.kept == 2
