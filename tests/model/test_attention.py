"""Attention: the paged kernel against a plain loop, and the guard that refuses what would be served wrongly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.model.attention import NAME, LayerAttention, UnsupportedModelError, bind, probe, torch_attention, torch_write
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import make_base
from server.model.step import Step
from server.settings import default_home
from tests.lab import BASE, Lab
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

CPU = torch.device("cpu")
DIM = 8


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.set_num_threads(1)
    if request.param == "torch":
        return Kernels("torch")
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


# ---- the kernel ----


class Pages:
    """Rows over shuffled pages, with the queries of a step and a plain loop that says what they should see."""

    def __init__(self, rows: Sequence[tuple[int, int]], *, size: int, heads: int, kv_heads: int, seed: int = 0) -> None:
        """`rows`: (context, tokens of this step), decode rows first."""
        self.random = torch.Generator().manual_seed(seed)
        self.rows, self.size, self.heads, self.kv_heads = rows, size, heads, kv_heads
        need = [-(-context // size) for context, _ in rows]
        blocks = (1 + torch.randperm(sum(need) + 3, generator=self.random)).tolist()
        self.keys, self.values = (torch.zeros(sum(need) + 4, size, kv_heads, DIM) for _ in range(2))
        self.tables = torch.zeros(len(rows), max(need), dtype=torch.int32)
        self.k, self.v = ([self._normal(context, kv_heads) for context, _ in rows] for _ in range(2))
        for i, count in enumerate(need):
            own = [blocks.pop() for _ in range(count)]
            self.tables[i, :count] = torch.tensor(own)
            for cache, stored in ((self.keys, self.k[i]), (self.values, self.v[i])):
                cache[own] = nn.functional.pad(stored, (0, 0, 0, 0, 0, count * size - len(stored))).view(
                    count, size, kv_heads, DIM
                )
        self.unused = blocks
        self.q = self._normal(sum(count for _, count in rows), heads)

    def _normal(self, count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, DIM, generator=self.random)

    @property
    def step(self) -> Step:
        counts = torch.tensor([count for _, count in self.rows])
        ends = counts.cumsum(0)
        return Step(
            tables=self.tables,
            starts=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
            contexts=torch.tensor([context for context, _ in self.rows], dtype=torch.int32),
            spans=tuple(zip((ends - counts).tolist(), ends.tolist(), [c for c, _ in self.rows], strict=True)),
            decodes=sum(1 for _, count in self.rows if count == 1),
        )

    def poison(self) -> None:
        """NaN wherever no row may look: unused blocks, and what lies behind a row's last position in its last block."""
        for cache in (self.keys, self.values):
            cache[self.unused] = torch.nan
            for table, (context, _) in zip(self.tables, self.rows, strict=True):
                if context % self.size:
                    cache[int(table[context // self.size]), context % self.size :] = torch.nan

    def expected(self, scale: float, window: int, softcap: float) -> Tensor:
        out, at = torch.empty_like(self.q), 0
        for (context, count), k, v in zip(self.rows, self.k, self.v, strict=True):
            for position in range(context - count, context):
                first = max(0, position - window + 1) if window else 0
                for head in range(self.heads):
                    group = head * self.kv_heads // self.heads
                    scores = (k[first : position + 1, group] @ self.q[at, head]).double() * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    out[at, head] = (scores.softmax(0)[:, None] * v[first : position + 1, group]).sum(0)
                at += 1
        return out


def attend(pages: Pages, kernels: Kernels, scale: float, window: int, softcap: float) -> Tensor:
    blocks, size, kv_heads, dim = pages.keys.shape
    keys, values = kernels.caches(torch.zeros, (blocks, size, kv_heads, dim))
    return kernels.attention(pages.q, keys.copy_(pages.keys), values.copy_(pages.values), pages.step, scale, window, softcap)


ROWS = {
    "decode": [(1, 1), (9, 1), (4, 1), (30, 1)],
    "prefill": [(5, 5), (13, 6), (8, 8), (2, 2)],
    "mixed": [(17, 1), (1, 1), (12, 1), (7, 7), (21, 4)],
    "one": [(3, 1)],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0), (5, 2.0), (1, 0.0), (100, 0.0)])
def test_attention_equals_a_loop_over_rows_and_heads(
    rows: str, heads: int, kv_heads: int, window: int, softcap: float, kernels: Kernels
) -> None:
    pages = Pages(ROWS[rows], size=4, heads=heads, kv_heads=kv_heads)
    got = attend(pages, kernels, 0.5, window, softcap)
    torch.testing.assert_close(got, pages.expected(0.5, window, softcap), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    decodes=st.lists(st.integers(1, 40), max_size=5),
    prefills=st.lists(st.tuples(st.integers(0, 20), st.integers(2, 9)), max_size=3),
    size=st.integers(1, 9),
    window=st.integers(0, 12),
)
def test_attention_over_random_tables(decodes: list[int], prefills: list[tuple[int, int]], size: int, window: int) -> None:
    rows = [(context, 1) for context in decodes] + [(done + count, count) for done, count in prefills] or [(1, 1)]
    pages = Pages(rows, size=size, heads=4, kv_heads=2, seed=len(rows))
    pages.poison()
    got = attend(pages, Kernels("torch"), 0.3, window, 0.0)
    torch.testing.assert_close(got, pages.expected(0.3, window, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 2.0)])
def test_nan_in_foreign_blocks_and_unwritten_tails_changes_no_bit(
    rows: str, window: int, softcap: float, kernels: Kernels
) -> None:
    pages = Pages(ROWS[rows], size=4, heads=4, kv_heads=2)
    clean = attend(pages, kernels, 0.5, window, softcap)
    pages.poison()
    assert torch.isnan(pages.keys).any()
    assert torch.equal(attend(pages, kernels, 0.5, window, softcap), clean)


@pytest.mark.parametrize("rows", ["decode", "prefill", "mixed"])
def test_nan_in_one_rows_context_stays_in_that_row(rows: str, kernels: Kernels) -> None:
    pages = Pages(ROWS[rows], size=4, heads=4, kv_heads=2)
    clean = attend(pages, kernels, 0.5, 0, 0.0)
    pages.values[int(pages.tables[1, 0])] = torch.nan
    got = attend(pages, kernels, 0.5, 0, 0.0)
    start, stop, _ = pages.step.spans[1]
    assert torch.isnan(got[start:stop]).any()
    others = [i for i in range(len(got)) if not start <= i < stop]
    assert torch.equal(got[others], clean[others])


def test_write_puts_each_token_where_the_step_says_and_nothing_elsewhere(kernels: Kernels) -> None:
    keys, values = kernels.caches(torch.zeros, (5, 4, 2, DIM))
    k, v = (torch.randn(1, 2, 3, DIM, generator=torch.Generator().manual_seed(i)) for i in range(2))
    kernels.write(k, v, keys, values, torch.tensor([6, 19, 11]))
    for cache, new in ((keys, k), (values, v)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[[6, 19, 11]], new[0].transpose(0, 1))
        assert flat.abs().sum((1, 2)).nonzero().flatten().tolist() == [6, 11, 19]


def test_a_layer_writes_before_it_attends() -> None:
    step = Pages([(1, 1)], size=4, heads=2, kv_heads=2).step
    step.write = torch.tensor([int(step.tables[0, 0]) * 4])
    layer = LayerAttention(torch.zeros(9, 4, 2, DIM), torch.zeros(9, 4, 2, DIM), step, torch_attention, torch_write)
    q, k, v = (torch.randn(1, 2, 1, DIM) for _ in range(3))
    assert torch.equal(layer(q, k, v, 1.0), v.transpose(1, 2))


# ---- sliding windows and softcaps in whole models ----

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=8, attn_logit_softcapping=1.5, query_pre_attn_scalar=8)
    ),
}


def randomised(build: Callable[[], PreTrainedModel], attention: str = "eager") -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(std=0.3, generator=generator)
    model.config._attn_implementation = attention
    return model


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Hugging Face's own tokens and logits, every one from the whole text."""
    ids, logits = list(prompt), []
    for _ in range(count):
        logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_models_give_hugging_faces_tokens(name: str, kernels: Kernels) -> None:
    oracle = randomised(WINDOWED[name])
    lab = Lab(randomised(WINDOWED[name]), {}, kernels=kernels, max_batch_tokens=7)
    generator = torch.Generator().manual_seed(1)
    prompts = {str(n): torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 6, 9, 21)}
    for id, prompt in prompts.items():
        lab.submit(id, prompt, max_new_tokens=14)
        lab.turn()
    lab.run()
    for id, prompt in prompts.items():
        tokens, logits = greedy(oracle, prompt, 14)
        assert lab.tokens(id) == tokens
        assert (lab.logits(id) - logits).abs().max() < 1e-3


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_matters_in_these_models(name: str) -> None:
    prompt = list(range(3, 24))
    narrow, wide = randomised(WINDOWED[name]), randomised(WINDOWED[name])
    for module in wide.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 200
    wide.config.sliding_window = 200
    assert (greedy(narrow, prompt, 1)[1] - greedy(wide, prompt, 1)[1]).abs().max() > 0.01


# ---- the guard ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_guard_accepts_every_tiny_architecture(architecture: str) -> None:
    base = make_base(tiny_model(architecture), BASE, CPU, torch.float32)
    assert len({id(module) for module in base.attention.modules}) == 2
    assert base.attention.head_dim == 8
    assert base.attention.kv_heads == ARCHITECTURES[architecture].get("num_key_value_heads", 4)
    left = [module for module in base.model.modules() if hasattr(module, "_adapterd_attention")]
    assert left == []


def test_the_guard_accepts_a_mixture_of_experts() -> None:
    config = MixtralConfig(**SIZES, head_dim=8, num_local_experts=4)
    assert len(probe(randomised(lambda: MixtralForCausalLM(config), NAME), 2).modules) == 2


class Layer(nn.Module):
    """Attention as a transformers model calls it."""

    def __init__(self, **extra: Any) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.extra = extra
        self.times = 1
        self.kv_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = k[:, : self.kv_heads], v[:, : self.kv_heads]
        for _ in range(self.times):
            mixed, _ = ALL_ATTENTION_FUNCTIONS[NAME](self, q, k, v, self.extra.get("mask"), scaling=1.0, **self._kwargs())
        return x + mixed.flatten(2) if self.times else x

    def _kwargs(self) -> dict[str, Any]:
        return {key: value for key, value in self.extra.items() if key != "mask"}


class Toy(nn.Module):
    """The smallest model the guard can look at."""

    def __init__(self, *layers: Layer, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig(**config)
        self.embed, self.layers, self.head = nn.Embedding(11, 16), nn.ModuleList(layers), nn.Linear(16, 11)

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(self.meet(x)[:, logits_to_keep]))

    def meet(self, x: Tensor) -> Tensor:
        return x


def refusal(model: nn.Module, layers: int = 2) -> str:
    with pytest.raises(UnsupportedModelError) as caught, torch.inference_mode():
        probe(model, layers)
    assert not any(hasattr(module, "_adapterd_attention") for module in model.modules())
    return str(caught.value)


def test_the_toy_itself_passes() -> None:
    shape = probe(Toy(Layer(), Layer()), 2)
    assert (len(shape.modules), shape.kv_heads, shape.head_dim) == (2, 2, 8)


def test_a_layer_that_never_asks_for_attention() -> None:
    silent = Layer()
    silent.times = 0
    assert refusal(Toy(Layer(), silent)) == "Toy asked for attention 1 times in 2 layers; it cannot be served"


def test_a_layer_that_asks_twice() -> None:
    twice = Layer()
    twice.times = 2
    assert "asked for attention 3 times in 2 layers" in refusal(Toy(Layer(), twice))


def test_a_layer_that_stands_in_for_another() -> None:
    shared = Layer()
    assert "2 times in 2 layers" in refusal(Toy(shared, shared))


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "alibi"])
def test_an_unknown_keyword_is_refused_by_name(name: str) -> None:
    assert refusal(Toy(Layer(), Layer(**{name: torch.ones(2)}))) == (
        f"Layer passes {name} to attention, which is not implemented"
    )
    assert probe(Toy(Layer(), Layer(**{name: None})), 2)


def test_a_mask_of_the_models_own_is_refused() -> None:
    assert "passes attention_mask to attention" in refusal(Toy(Layer(), Layer(mask=torch.zeros(1, 1, 1, 1))))


def test_attention_that_is_not_causal_is_refused_however_it_says_so() -> None:
    assert refusal(Toy(Layer(), Layer(is_causal=False))) == "Layer is not causal"
    bidirectional = Layer()
    bidirectional.is_causal = False
    assert refusal(Toy(Layer(), bidirectional)) == "Layer is not causal"
    assert probe(Toy(Layer(), Layer(is_causal=True)), 2)


def test_layers_of_different_kv_shapes_are_refused() -> None:
    narrow = Layer()
    narrow.kv_heads = 1
    assert refusal(Toy(Layer(), narrow)) == "Toy has layers of different KV shapes [(1, 8), (2, 8)]"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"sliding_window": 8}, "sliding_attention"),
    ],
)
def test_a_window_that_only_a_mask_would_apply_is_refused(config: dict[str, Any], kind: str) -> None:
    assert refusal(Toy(Layer(), Layer(), **config)) == f"Toy has layers of {kind}, which is not implemented"


def test_a_window_that_the_call_names_passes() -> None:
    kinds = ["full_attention", "sliding_attention"]
    assert probe(Toy(Layer(), Layer(sliding_window=8), layer_types=kinds), 2)


def test_a_model_whose_tokens_meet_outside_attention_is_refused() -> None:
    class Recurrent(Toy):
        def meet(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    assert "mixes tokens outside attention" in refusal(Recurrent(Layer(), Layer()))


@pytest.mark.parametrize(
    "error", [KeyError("adapterd"), TypeError("mask"), RuntimeError("shape"), NotImplementedError("alibi")]
)
def test_a_model_that_raises_is_refused_with_its_reason(error: Exception) -> None:
    class Broken(Toy):
        def meet(self, x: Tensor) -> Tensor:
            raise error

    assert refusal(Broken(Layer(), Layer())) == f"Broken does not run with a custom attention: {error!r}"


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)), "0 times in 2"),
    "bert": (lambda: BertLMHeadModel(BertConfig(**{k: v for k, v in SIZES.items() if "kv" not in k})), "is not causal"),
    "gpt_oss": (
        lambda: GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)),
        "passes s_aux to attention",
    ),
    "llama4": (
        lambda: Llama4ForCausalLM(Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=64, num_local_experts=2)),
        "layers of chunked_attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_real_architectures_that_cannot_be_served(name: str) -> None:
    build, reason = REFUSED[name]
    assert reason in refusal(randomised(build, NAME))


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_some_architectures_do_not_know_a_custom_attention_at_all(name: str) -> None:
    """If this starts to fail, the guard has something new to look at."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(KeyError):
        AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


def test_an_unbound_model_is_refused_when_it_runs() -> None:
    model = Toy(Layer())
    with pytest.raises(UnsupportedModelError, match="Layer calls attention before the engine has bound it"):
        model(torch.zeros(1, 1, dtype=torch.int64), None, False, torch.tensor([0]))


def test_bind_wants_one_cache_per_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        bind(probe(Toy(Layer(), Layer()), 2), [])
