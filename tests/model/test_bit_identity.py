"""A request's numbers to the last bit: alone, among 31 others of every family, in any chunks, order and after preemption.

With native kernels only: torch's products round by the number of rows that share them, so there a request moves by
rounding and no more. The base's matrices are exact in bf16, as in most checkpoints: a matrix unit may take part then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters_store.digest import Digest
from server.methods import METHODS
from server.methods.base import NO_PROMPT, Adapter, BaseShape, Checkpoint, Limits, Part
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import make_base
from server.model.native import NativeKernels
from server.model.native.prepared import PackedLinear
from server.settings import default_home
from tests.lab import BASE, Lab
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

CPU = torch.device("cpu")
PROMPT = [5, 9, 33, 60, 12, 71, 8]
MATES = 31
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def native() -> Kernels:
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


# ---- one adapter of every family ----


@functools.cache
def base_shape() -> BaseShape:
    return make_base(tiny_model("llama"), BASE, CPU, torch.float32).shape


class Trained:
    """Tensors as if trained, another stream of them for each seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every linear inside the layers."""
        modules = base_shape().modules
        return {n: (m.out_features, m.in_features) for n, m in modules.items() if m.kind == "linear" and n != HEAD}

    def low_rank(self, out: int, width: int, rank: int = 5) -> dict[str, Tensor]:
        return {"A": self(rank, width), "B": self(out, rank, scale=0.5)}

    def bottlenecks(self, *, norms: bool) -> dict[str, dict[str, Tensor]]:
        size = base_shape().hidden_size
        return {sublayer.exit: self.bottleneck(6, size, norms=norms) for sublayer in base_shape().sublayers}

    def bottleneck(self, width: int, size: int, *, norms: bool) -> dict[str, Tensor]:
        site = {
            "down": self(width, size, scale=0.3),
            "down_bias": self(width),
            "up": self(size, width, scale=0.3),
            "up_bias": self(size, scale=0.1),
        }
        names = [f"norm_{where}_{what}" for where in ("before", "after") for what in ("weight", "bias")] if norms else []
        return {**site, **{name: self(size, scale=0.3) for name in names}}


def lora(t: Trained) -> Checkpoint:
    sites = {n: t.low_rank(*shape) for n, shape in t.linears().items()}
    return Checkpoint("lora", {"scale": dict.fromkeys(sites, 0.7)}, sites)


def lora_in_bf16(t: Trained) -> Checkpoint:
    """Exact in bf16, so that a matrix unit may take part here too."""
    sites = {n: {side: m.bfloat16() for side, m in t.low_rank(*shape, rank=20).items()} for n, shape in t.linears().items()}
    return Checkpoint("lora", {"scale": dict.fromkeys(sites, 0.5)}, sites)


def lora_with_bias(t: Trained) -> Checkpoint:
    sites = {n: {**t.low_rank(*shape, rank=3), "bias": t(shape[0])} for n, shape in t.linears().items()}
    return Checkpoint("lora", {"scale": dict.fromkeys(sites, 0.7)}, sites)


def lora_at_the_ends(t: Trained) -> Checkpoint:
    size = base_shape().hidden_size
    sites = {EMBEDDING: t.low_rank(size, VOCAB), HEAD: t.low_rank(VOCAB, size)}
    return Checkpoint("lora", {"scale": dict.fromkeys(sites, 0.7)}, sites)


def dora(t: Trained) -> Checkpoint:
    sites = {n: {**t.low_rank(*shape), "magnitude": t(shape[0]).abs() + 0.5} for n, shape in t.linears().items()}
    return Checkpoint("dora", {"scale": dict.fromkeys(sites, 0.7)}, sites)


def ia3(t: Trained) -> Checkpoint:
    sides = {n: ("in", width) if "down" in n else ("out", out) for n, (out, width) in t.linears().items()}
    return Checkpoint("ia3", {}, {n: {side: 1 + t(size, scale=0.3)} for n, (side, size) in sides.items()})


def bitfit(t: Trained) -> Checkpoint:
    return Checkpoint("bitfit", {}, {n: {"delta": t(out, scale=0.5)} for n, (out, _) in t.linears().items()})


def norms(t: Trained) -> Checkpoint:
    found = [n for n, m in base_shape().modules.items() if m.kind == "norm"]
    return Checkpoint("ln_tuning", {}, {n: {"weight": 1 + t(base_shape().hidden_size, scale=0.3)} for n in found})


def whole_modules(t: Trained) -> Checkpoint:
    shapes = {n: shape for n, shape in t.linears().items() if "layers.1.mlp" in n}
    shapes |= dict.fromkeys((EMBEDDING, HEAD), (VOCAB, base_shape().hidden_size))
    return Checkpoint("full", {}, {n: {"weight": t(*shape, scale=0.3)} for n, shape in shapes.items()})


def tokens(t: Trained) -> Checkpoint:
    sites = {n: {"rows": t(32, base_shape().hidden_size)} for n in (EMBEDDING, HEAD)}
    config = {"field": "f", "indices": {n: list(range(5, 69, 2)) for n in sites}, "targeted": list(sites)}
    return Checkpoint("trainable_tokens", config, sites)


def bottleneck(t: Trained) -> Checkpoint:
    return Checkpoint("bottleneck", {"activation": "silu", "reads": "output", "skip": 0}, t.bottlenecks(norms=False))


def bottleneck_with_norms(t: Trained) -> Checkpoint:
    return Checkpoint("bottleneck", {"activation": "gelu", "reads": "sum", "skip": -1}, t.bottlenecks(norms=True))


def prefix(t: Trained) -> Checkpoint:
    return Checkpoint("prefix_tuning", {}, loose={"prompt_embeddings": t(5, 2 * 2 * 2 * 8)})


def soft_prompt(t: Trained) -> Checkpoint:
    return Checkpoint("prompt_tuning", {}, loose={"prompt_embeddings": t(3, base_shape().hidden_size)})


def classifier(t: Trained) -> Checkpoint:
    loose = {"dense.weight": t(7, base_shape().hidden_size), "dense.bias": t(7), "score.weight": t(3, 7)}
    return Checkpoint("head", {"task_type": "TOKEN_CLS", "activation": "gelu"}, loose=loose)


FAMILIES = {
    make.__name__: make
    for make in (
        *(lora, lora_in_bf16, lora_with_bias, lora_at_the_ends, dora, ia3, bitfit, norms, whole_modules, tokens),
        *(bottleneck, bottleneck_with_norms, prefix, soft_prompt),
    )
}


def read(checkpoint: Checkpoint) -> Part:
    return METHODS[checkpoint.method].read(checkpoint, base_shape(), Limits())


@functools.cache
def adapter(family: str, seed: int) -> Adapter:
    return Adapter(Digest.of(f"{family} {seed}".encode()), (read(FAMILIES[family](Trained(seed))),))


@functools.cache
def two_parts(seed: int) -> Adapter:
    parts = tuple(read(make(Trained(seed))) for make in (lora, bitfit, bottleneck, norms))
    return Adapter(Digest.of(f"parts {seed}".encode()), parts)


def everybody() -> list[Adapter]:
    return [*(adapter(family, seed) for seed in (1, 2) for family in FAMILIES), two_parts(1)]


# ---- the engine, with and without company ----


@dataclass(frozen=True)
class Company:
    """Who else is there, and how the engine has to deal with them."""

    mates: int = MATES
    adapters: Sequence[Adapter] = field(default_factory=everybody)
    budget: int = 400  # tokens of a step
    last: bool = False  # whether the request comes after the others have begun
    blocks: int = 600


ALONE = Company(mates=0)
COMPANIES = {
    "one step": Company(),
    "base only": Company(adapters=()),
    "small chunks": Company(budget=35),
    "late": Company(budget=60, last=True),
    "preempted": Company(budget=60, last=True, blocks=70),
}


BF16, FP32 = torch.bfloat16, torch.float32


def stored(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """A tiny model whose matrices are exact in `dtype`."""
    model = tiny_model(architecture)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.copy_(parameter.to(dtype))
    return model


def run(
    kernels: Kernels, mine: Adapter | None, company: Company, architecture: str = "llama", dtype: torch.dtype = BF16
) -> Lab:
    """A lab in which the request "me" has come to its end among the company."""
    known = {each.digest: each for each in (*company.adapters, *([mine] if mine else []))}
    lab = Lab(
        stored(architecture, dtype), known, kernels=kernels, max_batch_tokens=company.budget, blocks=company.blocks, slots=64,
        max_total_tokens=64,
    )  # fmt: skip
    if not company.last:
        _submit_mine(lab, mine)
    for i in range(company.mates):
        theirs = [company.adapters[i % len(company.adapters)].digest] if company.adapters else []
        prompt = torch.randint(3, VOCAB, (1 + i,), generator=torch.Generator().manual_seed(i)).tolist()
        lab.submit(f"mate {i}", prompt, *theirs, max_new_tokens=3 + i % 9)
    if company.last:
        for _ in range(3):
            lab.turn()
        _submit_mine(lab, mine)
    lab.run()
    return lab


def _submit_mine(lab: Lab, mine: Adapter | None) -> None:
    lab.submit("me", PROMPT, *([mine.digest] if mine else []), max_new_tokens=12)


def logprobs(lab: Lab) -> list[float | None]:
    return [token.logprob for event in lab.events if event.request_id == "me" for token in event.tokens]


def own(family: str) -> Adapter | None:
    return None if family == "base" else two_parts(3) if family == "four parts" else adapter(family, 3)


ALL = ["base", *FAMILIES, "four parts"]


@functools.cache
def by_itself(kernels: Kernels, family: str) -> Lab:
    return run(kernels, own(family), ALONE)


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize("family", ALL)
def test_native_bits_are_the_same_alone_and_among_thirty_one(family: str, company: str, native: Kernels) -> None:
    alone, among = by_itself(native, family), run(native, own(family), COMPANIES[company])
    assert torch.equal(among.logits("me"), alone.logits("me"))
    assert among.tokens("me") == alone.tokens("me")
    assert logprobs(among) == logprobs(alone)
    assert (among.observer.preemptions > 0) == (company == "preempted")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_changes_the_answer(family: str, native: Kernels) -> None:
    assert not torch.equal(by_itself(native, family).logits("me")[0], by_itself(native, "base").logits("me")[0])


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("family", ALL)
def test_native_bits_do_not_depend_on_where_a_prompt_is_cut(family: str, budget: int, native: Kernels) -> None:
    chunked = run(native, own(family), Company(mates=0, budget=budget))
    assert torch.equal(chunked.logits("me"), by_itself(native, family).logits("me"))


#: Mixtral's experts are products of torch's over the tokens that chose them.
ROUNDED = {"mixtral"}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_native_bits_of_every_architecture_are_the_same_in_company(
    architecture: str, dtype: torch.dtype, native: Kernels
) -> None:
    company = Company(adapters=(), budget=35)
    alone, among = (run(native, None, each, architecture, dtype).logits("me") for each in (ALONE, company))
    assert torch.equal(among, alone) or architecture in ROUNDED
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-4)


def test_a_matrix_unit_takes_part_where_there_is_one(native: Kernels) -> None:
    """Else what is above would say nothing of it: the bits of prompts are others, and near."""
    if not native.splits_prompts:
        pytest.skip("no matrix unit here")
    vectors = replace(native, prepare=_without_tiles(native))
    with_it, without = (run(kernels, None, ALONE).logits("me") for kernels in (native, vectors))
    assert not torch.equal(with_it, without)
    torch.testing.assert_close(with_it, without, rtol=0, atol=1e-4)


def test_a_matrix_unit_takes_part_in_lora_of_prompts(native: Kernels) -> None:
    if not native.splits_prompts:
        pytest.skip("no matrix unit here")
    kernel = native.lora
    assert kernel is not None
    vectors = replace(native, lora=lambda a, b, rows: kernel(a, b, replace(rows, prompt=NO_PROMPT)))
    with_it, without = (run(kernels, own("lora_in_bf16"), ALONE).logits("me") for kernels in (native, vectors))
    assert not torch.equal(with_it, without)
    torch.testing.assert_close(with_it, without, rtol=0, atol=1e-3)


def _without_tiles(native: Kernels) -> Callable[..., None]:
    packed = NativeKernels.packed_linear

    def in_panels(self: NativeKernels, *weight: Any, **how: Any) -> PackedLinear:
        return packed(self, *weight, **{**how, "tiles": False})

    def prepare(model: PreTrainedModel) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NativeKernels, "packed_linear", in_panels)
            assert native.prepare is not None
            native.prepare(model)

    return prepare


def test_the_next_turn_of_a_conversation_has_the_bits_that_it_has_without_the_first(native: Kernels) -> None:
    """What was generated is another turn's prompt: found in the cache only where that makes no difference."""
    text = [*PROMPT, *by_itself(native, "base").tokens("me"), 20, 21]

    def answer(*before: int) -> tuple[Tensor, int]:
        lab = Lab(stored("llama", BF16), {}, kernels=native, max_total_tokens=64)
        if before:
            lab.submit("first", list(before), max_new_tokens=12)
            lab.run()
        lab.submit("me", text, max_new_tokens=12)
        lab.run()
        return lab.logits("me"), lab.ending("me").cached_tokens

    (fresh, none), (again, cached) = answer(), answer(*PROMPT)
    assert none == 0
    assert cached == (4 if native.splits_prompts else 16)  # whole blocks of 4: of the 7 that were given, or of the 18 computed
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("family", ["lora", "bottleneck"])
def test_native_scores_of_a_classifier_are_the_same_bits_in_company(family: str, native: Kernels) -> None:
    parts = (*adapter(family, 3).parts, read(classifier(Trained(3))))
    mine = Adapter(Digest.of(f"classifier {family}".encode()), parts)

    def scores(mates: Sequence[Adapter], budget: int) -> Tensor:
        lab = Lab(
            tiny_model("llama"), {a.digest: a for a in (mine, *mates)}, kernels=native, max_batch_tokens=budget, slots=64,
            blocks=600,
        )  # fmt: skip
        for i, mate in enumerate(mates):
            lab.submit(f"mate {i}", PROMPT[: 1 + i % 7], mate.digest)
        lab.ask("classify", "me", PROMPT, mine.digest)
        lab.run()
        return lab.scores("me")

    alone = scores((), 400)
    assert alone.shape == (len(PROMPT), 3)
    assert torch.equal(scores(everybody(), 400), alone)
    assert torch.equal(scores(everybody(), 9), alone)


@pytest.mark.parametrize("family", ALL)
def test_torch_logits_move_by_rounding_at_most(family: str) -> None:
    alone = run(Kernels("torch"), own(family), ALONE).logits("me")
    among = run(Kernels("torch"), own(family), COMPANIES["small chunks"]).logits("me")
    torch.testing.assert_close(among, alone, rtol=1e-4, atol=1e-3)
