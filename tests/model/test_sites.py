"""Sites: hooks come with the first adapter and go with the last, ops run in their order, pools keep what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from server.methods import METHODS
from server.methods.base import BaseShape, Method, ModuleShape, Op, Part, Rows, Tensors
from server.methods.grouped import rows_of
from server.model.sites import Sites
from server.model.step import Step
from tests.lab import BASE

CPU = torch.device("cpu")
SHAPE = BaseShape(
    BASE, "toy", 4, 1, 1, 1, 4, 9, 64, {name: ModuleShape("linear", 4, 4) for name in ("first", "second", "third")}
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
        for parameter in self.parameters():
            parameter.data = torch.eye(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Probe(Op):
    """Writes down when it is called; `order` and `acts_before` as the test wants."""

    log: ClassVar[list[str]] = []

    def __init__(self, name: str, order: int) -> None:
        self.name = name
        self.order = order  # type: ignore[misc]
        self.tapped: tuple[str, ...] = ()
        self.broken: str | None = None
        self.held: set[int] = set()

    @property
    def taps(self) -> tuple[str, ...]:
        return self.tapped

    @property
    def acts_before(self) -> bool:
        return self.name == "before"

    def grow(self, capacity: int) -> None:
        if self.broken == "grow":
            raise MemoryError

    def put(self, slot: int, tensors: Tensors) -> None:
        self.held.add(slot)
        if self.broken == "put":
            raise MemoryError

    def clear(self, slot: int) -> None:
        self.held.discard(slot)

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        self.log.append(f"{self.name} before")
        return x

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        self.log.append(self.name)
        return y


class Probes(Method):
    """A method whose ops the test chose beforehand, by pool and module."""

    name = "probe"

    def __init__(self, make: Callable[[str, str], Probe]) -> None:
        self._make = make

    read = None  # type: ignore[assignment]

    def op(self, part: Part, module: str, base: BaseShape, device: torch.device, dtype: torch.dtype) -> Op:
        return self._make(str(part.pool), module)


Probes.__abstractmethods__ = frozenset()
Probe.__abstractmethods__ = frozenset()


class Bench:
    """Sites on the toy, with the real methods unless a test brings its own."""

    def __init__(self, make: Callable[[str, str], Probe] | None = None) -> None:
        self.model, self.step = Toy(), Step()
        methods: dict[str, Method] = dict(METHODS)
        if make is not None:
            methods["probe"] = Probes(make)
        self.sites = Sites(self.model, SHAPE, self.step, methods, CPU, torch.float32)

    def run(self, x: Tensor, **pools: list[int]) -> Tensor:
        """`pools`: for each pool the slot of every token, 0 for none."""
        self.step.rows = {name.replace("_", ":"): rows_of(slots) for name, slots in pools.items()}
        self.step.taps.clear()
        for rows in self.step.rows.values():
            rows.taps = self.step.taps
        y: Tensor = self.model(x)
        return y

    @property
    def hooked(self) -> dict[str, int]:
        hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in self.model.named_children()}
        return {name: count for name, count in hooks.items() if count}


def bitfit(value: float, *modules: str) -> Part:
    return Part("bitfit", "bitfit", {module: {"delta": torch.full((4,), value)} for module in modules})


def ia3(side: str, value: float, *modules: str) -> Part:
    return Part("ia3", "ia3", {module: {side: torch.full((4,), value)} for module in modules})


def test_hooks_come_with_the_first_adapter_and_go_with_the_last() -> None:
    bench = Bench()
    assert bench.hooked == {}
    bench.sites.put(bitfit(1.0, "first", "second"), 1)
    bench.sites.put(bitfit(2.0, "second"), 2)
    assert bench.hooked == {"first": 1, "second": 1}
    assert bench.sites.attached == ("first", "second")
    bench.sites.clear("bitfit", 1)
    assert bench.hooked == {"second": 1}
    bench.sites.clear("bitfit", 2)
    assert bench.hooked == {}
    assert bench.sites.attached == ()
    assert bench.sites.nbytes == 0


def test_clearing_what_is_not_there_does_nothing() -> None:
    bench = Bench()
    bench.sites.put(bitfit(1.0, "first"), 1)
    bench.sites.clear("bitfit", 2)
    bench.sites.clear("lora:8", 1)
    assert bench.hooked == {"first": 1}


def test_a_part_without_sites_is_no_business_of_theirs() -> None:
    bench = Bench()
    bench.sites.put(Part("prefix_tuning"), 1)
    assert bench.sites.attached == ()


def test_rows_go_through_their_own_slot_and_others_through_none() -> None:
    bench = Bench()
    bench.sites.put(bitfit(1.0, "first"), 1)
    bench.sites.put(bitfit(20.0, "first", "third"), 2)
    got = bench.run(torch.zeros(1, 4, 4), bitfit=[2, 0, 1, 2])
    assert got[0, :, 0].tolist() == [40.0, 0.0, 1.0, 40.0]


def test_a_step_without_rows_in_a_pool_passes_its_module_by() -> None:
    bench = Bench()
    bench.sites.put(bitfit(1.0, "first"), 1)
    assert torch.equal(bench.run(torch.ones(1, 3, 4)), torch.ones(1, 3, 4))


def test_pools_grow_and_keep_their_contents() -> None:
    bench = Bench()
    for slot in (1, 2, 9, 40):
        bench.sites.put(bitfit(float(slot), "first"), slot)
    got = bench.run(torch.zeros(1, 4, 4), bitfit=[40, 9, 2, 1])
    assert got[0, :, 0].tolist() == [40.0, 9.0, 2.0, 1.0]
    assert bench.sites.nbytes >= 41 * 4 * 4


def test_a_slot_is_put_anew() -> None:
    bench = Bench()
    bench.sites.put(bitfit(1.0, "first", "second"), 1)
    bench.sites.put(bitfit(1.0, "first"), 2)
    bench.sites.clear("bitfit", 1)
    bench.sites.put(bitfit(5.0, "first"), 1)
    assert bench.run(torch.zeros(1, 2, 4), bitfit=[1, 2])[0, :, 0].tolist() == [5.0, 1.0]


def test_ops_of_one_module_run_in_their_order_whatever_came_first() -> None:
    orders = {"before": 30, "late": 40, "early": 10, "middle": 20}
    bench = Bench(lambda pool, module: Probe(pool, orders[pool]))
    for pool in orders:
        bench.sites.put(Part("probe", pool, {"first": {}}), 1)
    Probe.log.clear()
    bench.run(torch.zeros(1, 1, 4), **{pool: [1] for pool in orders})
    assert Probe.log == ["before before", "early", "middle", "before", "late"]


def test_families_of_one_module_act_in_the_documented_order() -> None:
    """IA3-in, base, LoRA, bias, IA3-out: ((x * 2) + 3 (LoRA's A reads the scaled x) ...) * 5."""
    bench = Bench()
    bench.sites.put(Part("ia3", "ia3", {"first": {"in": torch.full((4,), 2.0), "out": torch.full((4,), 5.0)}}), 1)
    bench.sites.put(bitfit(7.0, "first"), 1)
    lora = {"A": torch.eye(4)[:1], "B": torch.ones(4, 1)}
    bench.sites.put(Part("lora", "lora:8", {"first": lora}), 1)
    got = bench.run(torch.ones(1, 1, 4), ia3=[1], bitfit=[1], lora_8=[1])
    assert got[0, 0].tolist() == [(2.0 + 2.0 + 7.0) * 5.0] * 4


def test_an_op_may_start_to_act_before_the_module_with_a_later_adapter() -> None:
    bench = Bench()
    bench.sites.put(ia3("out", 3.0, "first"), 1)
    assert bench.hooked == {"first": 1}
    bench.sites.put(ia3("in", 10.0, "first"), 2)
    assert bench.hooked == {"first": 2}
    got = bench.run(torch.ones(1, 3, 4), ia3=[1, 2, 0])
    assert got[0, :, 0].tolist() == [3.0, 10.0, 1.0]


def test_what_acts_before_a_module_leaves_the_given_input_alone() -> None:
    bench = Bench()
    bench.sites.put(ia3("in", 10.0, "first"), 1)
    x = torch.ones(1, 2, 4)
    bench.run(x, ia3=[1, 0])
    assert torch.equal(x, torch.ones(1, 2, 4))


def tapping(pool: str, module: str) -> Probe:
    probe = Probe(pool, 40)
    probe.tapped = ("first",)
    return probe


def test_a_tap_keeps_a_modules_input_as_long_as_some_op_wants_it() -> None:
    bench = Bench(tapping)
    bench.sites.put(Part("probe", "p", {"second": {}, "third": {}}), 1)
    bench.run(torch.full((1, 2, 4), 6.0), p=[1, 1])
    assert torch.equal(bench.step.taps["first"], torch.full((2, 4), 6.0))
    assert bench.hooked == {"first": 1, "second": 1, "third": 1}
    bench.sites.put(Part("probe", "p", {"second": {}}), 2)
    bench.sites.clear("p", 1)
    assert bench.hooked == {"first": 1, "second": 1}
    bench.sites.clear("p", 2)
    assert bench.hooked == {}


@pytest.mark.parametrize("tap_first", [True, False])
def test_a_tap_sees_what_the_base_gave_whichever_adapter_came_first(tap_first: bool) -> None:
    bench = Bench(tapping)
    puts = [(Part("probe", "p", {"second": {}}), 1), (ia3("in", 10.0, "first"), 1)]
    for part, slot in puts if tap_first else reversed(puts):
        bench.sites.put(part, slot)
    bench.run(torch.ones(1, 1, 4), p=[1], ia3=[1])
    assert torch.equal(bench.step.taps["first"], torch.ones(1, 4))


@pytest.mark.parametrize("broken", ["grow", "put", "op"])
def test_a_put_that_fails_half_way_is_undone_by_clear(broken: str) -> None:
    """Else the slot's next owner, who may be another tenant's, would run through what was left behind."""
    made: list[Probe] = []

    def make(pool: str, module: str) -> Probe:
        if module == "second" and broken == "op":
            raise MemoryError
        made.append(Probe(pool, 10))
        made[-1].broken = broken if module == "second" else None
        return made[-1]

    bench = Bench(make)
    with pytest.raises(MemoryError):
        bench.sites.put(Part("probe", "p", {"first": {}, "second": {}, "third": {}}), 1)
    bench.sites.clear("p", 1)
    assert bench.sites.attached == ()
    assert bench.hooked == {}
    assert all(not probe.held for probe in made)


def test_a_pool_that_could_not_grow_tries_again_at_the_next_put() -> None:
    made: list[Probe] = []

    def make(pool: str, module: str) -> Probe:
        made.append(Probe(pool, 10))
        return made[-1]

    bench = Bench(make)
    bench.sites.put(Part("probe", "p", {"first": {}}), 1)
    made[0].broken = "grow"
    for _ in range(2):
        with pytest.raises(MemoryError):
            bench.sites.put(Part("probe", "p", {"first": {}}), 5)
        bench.sites.clear("p", 5)
    assert made[0].held == {1}


def test_a_clear_that_raises_can_be_tried_again() -> None:
    made: dict[str, Probe] = {}

    def make(pool: str, module: str) -> Probe:
        return made.setdefault(module, Probe(pool, 10))

    bench = Bench(make)
    bench.sites.put(Part("probe", "p", {"first": {}, "second": {}}), 1)
    clear = made["second"].clear
    made["second"].clear = lambda slot: (_ for _ in ()).throw(MemoryError)  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        bench.sites.clear("p", 1)
    assert bench.sites.attached == ("second",)
    made["second"].clear = clear  # type: ignore[method-assign]
    bench.sites.clear("p", 1)
    assert (bench.sites.attached, made["second"].held) == ((), set())


class Speaker(nn.Module):
    """An embedding, and a head that sees the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(ids)[:, -1:])


class Notes(Probe):
    """Keeps what it is given."""

    def after(self, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        self.log.append(f"{self.name} {list(x.shape)} {x.dtype} {rows.index.tolist()}")
        return y


def test_an_embedding_is_given_ids_and_the_head_the_kept_rows() -> None:
    Probe.log = []
    modules = {"embed": ModuleShape("embedding", 9, 4), "lm_head": ModuleShape("linear", 4, 9)}
    shape = BaseShape(BASE, "toy", 4, 1, 1, 1, 4, 9, 64, modules)
    step, model = Step(), Speaker()
    sites = Sites(model, shape, step, {"probe": Probes(lambda pool, module: Notes(module, 10))}, CPU, torch.float32)
    sites.put(Part("probe", "probe", {"embed": {}, "lm_head": {}}), 1)
    step.rows, step.kept_rows = {"probe": rows_of([0, 1, 1])}, {"probe": rows_of([1])}
    model(torch.tensor([[3, 4, 5]]))
    assert Probe.log == ["embed [3] torch.int64 [1, 2]", "lm_head [1, 4] torch.float32 [0]"]


class Graphable(Probe):
    """Can be held by a graph until slot 3 is put."""

    @property
    def graphable(self) -> bool:
        return 3 not in self.held


def test_the_version_is_another_whenever_a_graph_would_be_stale() -> None:
    probes = Probes(lambda pool, module: Graphable(pool, 10))
    sites = Sites(Toy(), SHAPE, Step(), {"probe": probes}, CPU, torch.float32)
    seen = [sites.version]

    def changed() -> bool:
        seen.append(sites.version)
        return seen[-1] != seen[-2]

    sites.put(Part("probe", "p", {"first": {}, "second": {}}), 1)
    assert changed()  # ops came
    sites.put(Part("probe", "p", {"first": {}}), 0)
    assert not changed()  # room was there
    sites.put(Part("probe", "p", {"first": {}}), 2)
    assert changed()  # a pool grew
    assert sites.graphable("p")
    sites.put(Part("probe", "p", {"first": {}}), 3)
    assert changed()
    assert not sites.graphable("p")
    assert sites.graphable("another pool")
    sites.clear("p", 2)
    assert not changed()
    sites.clear("p", 1)
    assert changed()  # the last of `second` went
