"""Layer programs: the same bits as the modules they stand for, and modules again wherever something has to be called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.methods import METHODS
from server.methods.base import Adapter, Checkpoint, Limits, Part
from server.model import program as module
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.native import NativeKernels, NativeUnavailable, opcodes, open_library
from server.settings import default_home
from tests.lab import BASE, Lab, kernels_named
from tests.tiny import tiny_model

LAYERS = 2
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    torch.set_num_threads(1)
    return kernels_named("native")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each layer of each step ran as a program."""
    found: list[bool] = []
    run, through = module.LayerProgram.run, module.LayerProgram.run_through

    def is_step(program: module.LayerProgram) -> bool:
        """Neither a dry run nor the trial."""
        layer = module.attention_of(program._parts.attention)
        return layer is not None and layer.keys.shape[1] > 1

    def noted(self: module.LayerProgram, *args: object) -> bool:
        done = run(self, *args)  # type: ignore[arg-type]
        found.extend([done] * is_step(self))
        return done

    def noted_through(self: module.LayerProgram, hidden: Tensor, turn: module.Turn, layers: int) -> bool:
        done = through(self, hidden, turn, layers)
        found.extend([True] * layers * (done and is_step(self)))
        return done

    monkeypatch.setattr(module.LayerProgram, "run", noted)
    monkeypatch.setattr(module.LayerProgram, "run_through", noted_through)
    return found


def lora(name: str, rank: int, sites: Sequence[str], bf16: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(len(name) + rank)
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32), "o_proj": (32, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    tensors = {}
    for site in sites:
        out, into = shapes[site.rsplit(".", 1)[1]]
        a, b = (torch.randn(*size, generator=generator) * 0.3 for size in ((rank, into), (out, rank)))
        tensors[site] = {"A": a.bfloat16() if bf16 else a, "B": b.bfloat16() if bf16 else b}
    return Adapter(Digest.of(name.encode()), (Part("lora", f"lora:8{':bf16' if bf16 else ''}", tensors),))


def vectors(method: str, pool: str, sites: Mapping[str, Mapping[str, int]]) -> Adapter:
    """An adapter of vectors: module -> tensor name -> width."""
    generator = torch.Generator().manual_seed(len(method))
    made = {
        module: {name: 1 + torch.randn(width, generator=generator) * 0.3 for name, width in tensors.items()}
        for module, tensors in sites.items()
    }
    return Adapter(Digest.of(method.encode()), (Part(method, pool, made),))


def bottleneck(width: int) -> Adapter:
    """Of the form that reads nothing but the sublayer's output; any other is called from Python."""
    shape, generator = make_base(tiny_model("llama"), BASE, torch.device("cpu"), torch.float32).shape, torch.Generator()
    shapes = {"down": (width, 32), "down_bias": (width,), "up": (32, width), "up_bias": (32,)}
    sites = {s.exit: {n: torch.randn(size, generator=generator) * 0.3 for n, size in shapes.items()} for s in shape.sublayers}
    config = {"activation": "gelu", "reads": "output", "skip": 0}
    part = METHODS["bottleneck"].read(Checkpoint("bottleneck", config, sites), shape, Limits())
    return Adapter(Digest.of(b"bottleneck"), (part,))


EVERYWHERE = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
ADAPTERS = {
    "wide": lora("wide", 8, EVERYWHERE),
    "narrow": lora("narrow", 3, ["model.layers.1.mlp.up_proj"], bf16=True),
    "second": lora("second", 5, ["model.layers.0.self_attn.o_proj"]),
    "ia3": vectors("ia3", "ia3", {f"{LAYER}.self_attn.v_proj": {"out": 16}, f"{LAYER}.mlp.down_proj": {"in": 64}}),
    "bitfit": vectors("bitfit", "bitfit", {f"{LAYER}.self_attn.o_proj": {"delta": 32}, "model.norm": {"delta": 32}}),
    "bottleneck": bottleneck(6),
    "norm": vectors("ln_tuning", "norm", {f"{LAYER}.post_attention_layernorm": {"scale": 32, "shift": 32}}),
}
#: Scales the input that q, k and v share, so a layer with it runs as modules.
SHARED = vectors("ia3", "ia3", {"model.layers.0.self_attn.q_proj": {"in": 32}})


def answers(kernels: Kernels, names: Sequence[str], *, lab: Lab | None = None) -> Mapping[str, Tensor]:
    lab = lab or Lab(tiny_model("llama"), {a.digest: a for a in ADAPTERS.values()}, kernels=kernels, max_batch_tokens=7)
    for i, name in enumerate(names):
        chosen = () if name == "base" else (ADAPTERS[name].digest,)
        lab.submit(f"{i}{name}", [5 + i, 6, 7, 8, 9, 10], *chosen, max_new_tokens=5)
        lab.turn()
    lab.run()
    return {f"{i}{name}": lab.logits(f"{i}{name}") for i, name in enumerate(names)}


def test_a_program_gives_the_bits_of_the_modules(kernels: Kernels, ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["base", *ADAPTERS, "wide", "base"]
    fast = answers(kernels, names)
    assert ran
    assert all(ran)
    monkeypatch.setattr(module.LayerProgram, "run_through", lambda self, hidden, turn, layers: False)
    layers = answers(kernels, names)
    monkeypatch.setattr(module.LayerProgram, "run", lambda self, hidden, turn: False)
    plain = answers(kernels, names)
    assert all(torch.equal(fast[name], plain[name]) and torch.equal(layers[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_nothing_runs_between_the_layers_of_a_model(kernels: Kernels, name: str) -> None:
    model = tiny_model(name)
    Lab(model, {}, kernels=kernels)
    assert "forward" in vars(model.model)


def test_a_model_that_does_more_than_run_its_layers_is_left_alone(kernels: Kernels) -> None:
    model = tiny_model("llama")
    inner, plain = model.model, type(model.model).forward

    def more(*args: object, **kwargs: object) -> object:
        out = plain(inner, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    inner.forward = more
    Lab(model, {}, kernels=kernels)
    assert inner.forward is more
    assert all("forward" in vars(layer) for layer in inner.layers)


def test_whoever_looks_at_what_the_layers_begin_with_or_leave_sees_it(kernels: Kernels, ran: list[bool]) -> None:
    model = tiny_model("llama")
    lab = Lab(model, {}, kernels=kernels)
    seen: list[Tensor] = []
    first, last = model.model.layers[0], model.model.layers[-1]
    hooks = [
        first.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())),
        last.register_forward_hook(lambda m, args, y: seen.append(y.clone())),
        model.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())),
    ]
    lab.submit("looked at", [5, 6, 7], max_new_tokens=1)
    lab.run()
    begun, left, given = seen
    assert torch.equal(left, given)
    assert not torch.equal(begun, left)
    for hook in hooks[:2]:
        hook.remove()
    seen.clear()
    ran.clear()
    lab.submit("not", [5, 6, 7], max_new_tokens=1)
    lab.run()
    assert [torch.equal(each, given) for each in seen] == [True]
    assert ran == [True] * LAYERS


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_move_no_bit(kernels: Kernels, threads: int) -> None:
    expected = answers(kernels, ["wide", "base", "narrow"])
    native = open_library(default_home(), lambda line: None)
    try:
        native.set_threads(threads)
        got = answers(kernels, ["wide", "base", "narrow"])
    finally:
        native.set_threads(1)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The instructions of each native call of steps."""
    found: list[int] = []
    layer = NativeKernels.layer

    def noted(self: NativeKernels, program: Tensor, frame: Tensor) -> None:
        found.append(len(program))
        layer(self, program, frame)

    monkeypatch.setattr(NativeKernels, "layer", noted)
    return found


def test_layers_that_follow_one_another_run_in_one_call(kernels: Kernels, calls: list[int], ran: list[bool]) -> None:
    lab = Lab(tiny_model("llama"), {a.digest: a for a in ADAPTERS.values()}, kernels=kernels, max_batch_tokens=7)
    calls.clear()  # the trial's, of each layer by itself
    answers(kernels, ["base", "wide", "bottleneck"], lab=lab)
    assert len(calls) == len(ran) // LAYERS > 0


def test_whoever_looks_between_two_layers_sees_what_is_there(kernels: Kernels, calls: list[int]) -> None:
    """A hook on a layer, which looks at nothing inside it, splits the call."""
    model = tiny_model("llama")
    lab = Lab(model, {}, kernels=kernels)
    seen: list[list[Tensor]] = [[], []]
    calls.clear()
    first, second = model.model.layers
    hooks = [
        layer.register_forward_hook(lambda m, args, y, into=into: into.append(y.clone()))
        for layer, into in zip((first, second), seen, strict=True)
    ]
    answers(kernels, ["base"], lab=lab)
    assert len(calls) == len(seen[0]) + len(seen[1])
    assert not any(torch.equal(first, second) for first, second in zip(*seen, strict=True))
    for hook in hooks:
        hook.remove()
    calls.clear()
    lab.submit("again", [50, 6, 7], max_new_tokens=1)
    lab.run()
    assert len(calls) == 1


def test_a_layer_with_a_hook_runs_as_modules_and_the_others_do_not(kernels: Kernels, ran: list[bool]) -> None:
    model = tiny_model("llama")
    lab = Lab(model, {}, kernels=kernels)
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, y: seen.append(y))
    answers(kernels, ["base"], lab=lab)
    assert ran == [True, False] * (len(ran) // LAYERS)
    assert len(seen) == len(ran) // LAYERS


def test_an_op_that_has_to_be_called_makes_its_layer_run_as_modules(kernels: Kernels, ran: list[bool]) -> None:
    """Its layer falls back for that composition, and comes back with the next."""
    lab = Lab(tiny_model("llama"), {SHARED.digest: SHARED}, kernels=kernels)
    lab.submit("shared", [5, 6, 7], SHARED.digest, max_new_tokens=2)
    lab.run()
    assert ran == [False, True] * (len(ran) // LAYERS)
    ran.clear()
    lab.submit("base", [5, 6, 7], max_new_tokens=2)
    lab.run()
    assert all(ran)


def test_the_space_grows_with_the_step_and_programs_are_written_again(kernels: Kernels, ran: list[bool]) -> None:
    small = answers(kernels, ["wide"])["0wide"]
    lab = Lab(tiny_model("llama"), {a.digest: a for a in ADAPTERS.values()}, kernels=kernels, max_batch_tokens=64)
    lab.submit("first", [5, 6], max_new_tokens=1)
    lab.run()
    lab.submit("long", list(range(5, 65)), max_new_tokens=1)
    lab.submit("mine", [5, 6, 7, 8, 9, 10], ADAPTERS["wide"].digest, max_new_tokens=5)
    lab.run()
    assert all(ran)
    assert torch.equal(lab.logits("mine"), small)


# ---- the native side ----


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    try:
        return open_library(default_home(), lambda line: None)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def frame(hidden: Tensor, **words: int) -> Tensor:
    names = ("hidden", "cos", "sin", "turned", "write", "tables", "width", "cu", "ctx", "rows", "tokens", "prompt")
    return torch.tensor([{"hidden": hidden.data_ptr(), "tokens": len(hidden), **words}.get(name, 0) for name in names])


def instructions(*given: Sequence[int]) -> Tensor:
    program = torch.zeros(len(given), opcodes.INSTRUCTION_WORDS, dtype=torch.int64)
    for row, words in zip(program, given, strict=True):
        row[: len(words)] = torch.tensor(words)
    return program


def test_instructions_run_in_order(native: NativeKernels) -> None:
    hidden, other = torch.ones(3, 40), torch.full((3, 40), 2.0)
    add = (opcodes.ADD, other.data_ptr(), 0, 40)
    gate = (opcodes.SILU_MUL, 0, 0, other.data_ptr(), 40)
    native.layer(instructions(add, gate, add), frame(hidden))
    torch.testing.assert_close(hidden, 3 + torch.nn.functional.silu(torch.full((3, 40), 3.0)) * 3)


def test_a_program_that_breaks_a_rule_runs_nothing(native: NativeKernels) -> None:
    hidden = torch.ones(2, 8)
    add = (opcodes.ADD, 0, 0, 8)
    a, b = torch.ones(3, 4, 8), torch.ones(3, 4, 8)
    for index, slot, message in (([0, 2], [1, 1], "index names a row"), ([0, 1], [1, 3], "slot names a slot")):
        run = native.lora_over(a, b, torch.tensor(index), torch.tensor(slot))
        with pytest.raises(ValueError, match=message):
            native.layer(instructions(add, run.words(0, 0)), frame(hidden))
    write = torch.tensor([0, 99])
    with pytest.raises(ValueError, match="write names a position outside"):
        native.layer(instructions(add, (opcodes.WRITE, 0, 0, 0, 0, 0, 2, 8, 1, 1, 8)), frame(hidden, write=write.data_ptr()))
    with pytest.raises(ValueError, match="unknown instruction"):
        native.layer(instructions(add, (99,)), frame(hidden))
    assert torch.equal(hidden, torch.ones(2, 8))


def test_programs_and_frames_of_another_shape_are_refused(native: NativeKernels) -> None:
    with pytest.raises(ValueError, match="program must be"):
        native.layer(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match="frame must be"):
        native.layer(instructions((0,)), torch.zeros(3, dtype=torch.int64))
