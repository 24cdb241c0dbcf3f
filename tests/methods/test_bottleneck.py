"""The bottleneck op against a plain loop, the layout table against the models themselves, and both against hooks by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods.activations import ACTIVATIONS
from server.methods.base import BaseShape, Checkpoint, Limits, Part, Rows, Tensors
from server.methods.bottleneck import READS, Bottleneck, BottleneckOp, Form, Kernel, _Gathered, bucket_of
from server.methods.grouped import rows_of
from server.methods.layout import LAYOUTS, sublayers
from server.model.kernels import choose_kernels
from server.settings import default_home

CPU = torch.device("cpu")
HIDDEN = 16
EXIT = "model.layers.0.self_attn.o_proj"
FFN = "model.layers.0.mlp.down_proj"
RESIDUAL = "model.layers.0.input_layernorm"


def base_shape(model_type: str = "llama", hidden: int = HIDDEN, config: Mapping[str, object] | None = None) -> BaseShape:
    return BaseShape(
        digest=Digest("0" * 64),
        model_type=model_type,
        hidden_size=hidden,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=hidden // 2,
        vocab_size=32,
        max_positions=64,
        modules={},
        sublayers=sublayers(model_type, 2, config),
    )


def random_site(width: int, hidden: int = HIDDEN, seed: int = 0, norm_after: bool = False) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}
    if norm_after:
        shapes |= {"norm_after_weight": (hidden,), "norm_after_bias": (hidden,)}
    return {name: torch.randn(shape, generator=made) * 0.4 for name, shape in shapes.items()}


def by_hand(form: Form, y: Tensor, r: Tensor, site: Tensors) -> Tensor:
    """One adapter on rows y [n, H] with residual r [n, H]: the definition, without buckets, slots or batching."""
    x = {"output": y, "sum": y + r, "residual": r}[form.reads]
    if form.norm_before:
        x = F.layer_norm(x, (x.shape[-1],))
    branch = ACTIVATIONS[form.activation](x @ site["down"].T + site["down_bias"]) @ site["up"].T + site["up_bias"]
    if form.norm_after:
        branch = F.layer_norm(branch, (y.shape[-1],), site["norm_after_weight"], site["norm_after_bias"])
    return y + branch + form.skip * r


FORMS = [
    Form(8, activation, reads, skip, norm_before, norm_after)
    for (reads, skip), activation, norm_before, norm_after in product(
        [("output", 0), ("sum", 0), ("sum", 1), ("residual", 0), ("residual", -1)], ["tanh"], [False, True], [False, True]
    )
]
#: Slot of every token of a step; 0 is a token of another pool or of no adapter.
PATTERNS = {
    "distinct": [1, 2, 3, 4, 5, 6],
    "uniform": [1, 1, 2, 2, 3, 3, 4, 4],
    "skewed": [1] * 9 + [2, 2, 3, 5],
    "identical": [3] * 6,
    "one row": [4],
    "shuffled": [0, 3, 1, 6, 0, 3, 2, 2, 1, 5],
    "decode beside prefill": [2, 1, 6, *[5] * 7, *[4] * 5],
    "holes": [1, 0, 3, 0, 0, 6],
    "nobody": [0, 0, 0],
}


class Bench:
    """An op with adapters of width 3..8 in slots 1..6."""

    def __init__(self, form: Form, kernel: Kernel | None = None) -> None:
        self.form = form
        self.op = BottleneckOp(form, HIDDEN, RESIDUAL, CPU, torch.float32, kernel)
        self.op.grow(8)
        self.sites = {slot: random_site(2 + slot, seed=slot, norm_after=form.norm_after) for slot in range(1, 7)}
        for slot, site in self.sites.items():
            self.op.put(slot, site)
        torch.manual_seed(1)
        self.y, self.r = torch.randn(20, HIDDEN), torch.randn(20, HIDDEN)

    def rows(self, slots: list[int]) -> Rows:
        rows = rows_of(slots)
        rows.taps = {RESIDUAL: self.r[: len(slots)]}
        return rows

    def after(self, slots: list[int]) -> Tensor:
        y = self.y[: len(slots)].clone()
        return self.op.after(y, y, self.rows(slots))

    def loop(self, slots: list[int]) -> Tensor:
        rows = [
            by_hand(self.form, self.y[t : t + 1], self.r[t : t + 1], self.sites[slot])[0] if slot else self.y[t]
            for t, slot in enumerate(slots)
        ]
        return torch.stack(rows)


@pytest.fixture(scope="module")
def native() -> Kernel:
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.bottleneck is None:
        pytest.skip(chosen.name)
    return chosen.bottleneck


@pytest.fixture(scope="module", params=["torch", "native"])
def kernel(request: pytest.FixtureRequest) -> Kernel | None:
    """What the products are computed with; None: torch."""
    return request.getfixturevalue("native") if request.param == "native" else None


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pool)
def test_equals_a_plain_loop(form: Form, pattern: str, kernel: Kernel | None) -> None:
    bench, slots = Bench(form, kernel), PATTERNS[pattern]
    assert torch.allclose(bench.after(slots), bench.loop(slots), atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pool)
def test_native_rows_have_the_same_bits_alone_and_in_company(form: Form, pattern: str, native: Kernel) -> None:
    bench, slots = Bench(form, native), PATTERNS[pattern]
    together = bench.after(slots)
    for token, slot in enumerate(slots):
        assert torch.equal(bench.after([0] * token + [slot])[token], together[token])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_torchs_to_rounding(activation: str, kernel: Kernel | None) -> None:
    bench, slots = Bench(Form(8, activation, "output", 0, False, False), kernel), PATTERNS["skewed"]
    torch.testing.assert_close(bench.after(slots), bench.loop(slots), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS[::3], ids=lambda form: form.pool)
def test_a_nan_slot_touches_its_own_rows_only(form: Form, pattern: str, kernel: Kernel | None) -> None:
    slots = PATTERNS[pattern]
    bench, poisoned = Bench(form, kernel), Bench(form, kernel)
    poisoned.op.put(3, {name: torch.full_like(tensor, torch.nan) for name, tensor in bench.sites[3].items()})
    clean, dirty = bench.after(slots), poisoned.after(slots)
    own = torch.tensor([slot == 3 for slot in slots])
    assert torch.equal(clean[~own], dirty[~own])
    assert dirty[own].isnan().all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pool)
def test_slots_without_an_adapter_are_the_identity_to_the_bit(form: Form, kernel: Kernel | None) -> None:
    bench, slots = Bench(form, kernel), [2, 0, 7, 2, 1, 7, 7, 7, 7]  # nobody was ever put into 7
    bench.op.clear(2)
    y, out = bench.y[: len(slots)], bench.after(slots)
    others = torch.tensor([slot != 1 for slot in slots])
    assert torch.equal(out[others], y[others])
    assert torch.allclose(out[4:5], by_hand(form, y[4:5], bench.r[4:5], bench.sites[1]), atol=1e-5)
    assert torch.equal(bench.op.after(y, y.clone(), bench.rows([0] * 9)), y)


def test_a_cleared_slot_keeps_nothing_of_its_adapter() -> None:
    op = Bench(FORMS[0]).op
    op.clear(4)
    assert all(not pool.tensor[4].any() for pool in op._pools.values())


def test_a_slot_given_again_holds_the_new_adapter_only(kernel: Kernel | None) -> None:
    bench = Bench(FORMS[0], kernel)
    bench.sites[6] = random_site(2, seed=99)  # slot 6 had width 8
    bench.op.put(6, bench.sites[6])
    assert torch.allclose(bench.after([6, 6, 1]), bench.loop([6, 6, 1]), atol=1e-5)


def test_growing_keeps_what_is_there_also_for_a_composition_in_progress(kernel: Kernel | None) -> None:
    bench = Bench(FORMS[0], kernel)
    rows, y = bench.rows([1, 2, 3]), bench.y[:3]
    first = bench.op.after(y, y.clone(), rows)
    before = bench.op.nbytes
    bench.op.grow(64)
    assert bench.op.nbytes > before
    assert torch.equal(bench.op.after(y, y.clone(), rows), first)
    assert torch.equal(bench.after([1, 2, 3]), first)


def test_weights_are_gathered_once_per_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Tensor] = []
    of = _Gathered.of

    def noted(self: _Gathered, slots: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        gathered.append(slots)
        return of(self, slots, dtype)

    monkeypatch.setattr(_Gathered, "of", noted)
    bench = Bench(FORMS[0])
    rows, y = bench.rows([1, 3, 6]), bench.y[:3]
    for _ in range(3):
        bench.op.after(y, y.clone(), rows)
    assert [slots.tolist() for slots in gathered] == [[1, 3, 6]]


def test_taps_its_residual_only_where_the_form_reads_it() -> None:
    taps = {form.pool: BottleneckOp(form, HIDDEN, RESIDUAL, CPU, torch.float32).taps for form in FORMS}
    assert {pool for pool, names in taps.items() if not names} == {f.pool for f in FORMS if f.reads == "output"}
    assert set(taps.values()) == {(), (RESIDUAL,)}


def test_runs_in_bf16() -> None:
    form = FORMS[0]
    op = BottleneckOp(form, HIDDEN, RESIDUAL, CPU, torch.bfloat16)
    op.grow(2)
    op.put(1, random_site(8, seed=1))
    y = torch.randn(3, HIDDEN)
    want = by_hand(form, y, y, random_site(8, seed=1))
    assert torch.allclose(op.after(y, y.clone(), rows_of([1, 1, 1])), want, atol=0.05)
    low = op.after(y, y.bfloat16(), rows_of([1, 1, 1]))
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), want, atol=0.1)


# --- Reading ---------------------------------------------------------------------------------------------------------


def read(sites: Mapping[str, Tensors], base: BaseShape | None = None, limits: Limits | None = None, **config: object) -> Part:
    checkpoint = Checkpoint("bottleneck", {"activation": "relu", "reads": "output", "skip": 0, **config}, sites)
    return Bottleneck().read(checkpoint, base or base_shape(), limits or Limits())


def served(part: Part, y: Tensor, r: Tensor, module: str = EXIT) -> Tensor:
    op = Bottleneck().op(part, module, base_shape(), CPU, torch.float32)
    op.grow(2)
    op.put(1, part.sites[module])
    rows = rows_of([1] * len(y))
    rows.taps = dict.fromkeys(op.taps, r)
    return op.after(y, y.clone(), rows)


def test_widths_share_few_pools() -> None:
    assert [bucket_of(width) for width in (1, 8, 9, 12, 13, 17, 36, 72, 288)] == [8, 8, 12, 12, 16, 24, 48, 96, 384]
    assert all(bucket_of(bucket_of(width)) == bucket_of(width) >= width for width in range(1, 600))
    assert read({EXIT: random_site(9)}).pool == read({EXIT: random_site(3), FFN: random_site(12)}).pool


def test_pools_are_told_apart_by_everything_but_tensors() -> None:
    pools = {
        Form(width, activation, reads, skip, before, after).pool
        for width, activation, reads, skip, before, after in product(
            (8, 12), ("relu", "silu"), READS, (-1, 0, 1), (False, True), (False, True)
        )
    }
    assert len(pools) == 2 * 2 * 3 * 3 * 2 * 2
    assert all(Form.parse(pool).pool == pool for pool in pools)


def test_reads_sites_of_different_widths_into_one_part() -> None:
    sites = {EXIT: random_site(3, seed=1), FFN: random_site(11, seed=2)}
    part, y = read(sites), torch.randn(4, HIDDEN)
    for module, site in sites.items():
        form = Form(12, "relu", "output", 0, False, False)
        assert torch.allclose(served(part, y, y, module), by_hand(form, y, y, site), atol=1e-5)


@pytest.mark.parametrize("scale", [torch.tensor([4.0]), torch.linspace(-1, 2, HIDDEN)])
@pytest.mark.parametrize("norm_after", [False, True])
def test_a_scale_is_folded_into_the_branch(scale: Tensor, norm_after: bool) -> None:
    site, y = random_site(8, norm_after=norm_after), torch.randn(4, HIDDEN)
    form = Form(8, "relu", "output", 0, False, norm_after)
    scaled = {**site, "up": site["up"] * scale[:, None], "up_bias": site["up_bias"] * scale}
    part = read({EXIT: {**site, "scale": scale}})
    assert "scale" not in part.sites[EXIT]
    assert torch.allclose(served(part, y, y), by_hand(form, y, y, scaled), atol=1e-4)


def test_the_affine_part_of_a_norm_before_is_folded() -> None:
    site, y = random_site(8), torch.randn(4, HIDDEN)
    weight, bias = torch.rand(HIDDEN), torch.randn(HIDDEN)
    part = read({EXIT: {**site, "norm_before_weight": weight, "norm_before_bias": bias}})
    x = F.layer_norm(y, (HIDDEN,), weight, bias)
    want = y + F.relu(x @ site["down"].T + site["down_bias"]) @ site["up"].T + site["up_bias"]
    assert torch.allclose(served(part, y, y), want, atol=1e-5)


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in random_site(8).items() if key != name}


REFUSED: dict[str, tuple[str, dict[str, Tensors]]] = {
    "no sites": ("bottleneck", {}),
    "missing": (f"{EXIT}.up_bias", {EXIT: without("up_bias")}),
    "wrong hidden size": (f"{EXIT}.down", {EXIT: random_site(8, hidden=12)}),
    "up of another width": (f"{EXIT}.up", {EXIT: {**random_site(8), "up": torch.ones(HIDDEN, 7)}}),
    "a matrix for a bias": (f"{EXIT}.up_bias", {EXIT: {**random_site(8), "up_bias": torch.ones(HIDDEN, 1)}}),
    "scale of another size": (f"{EXIT}.scale", {EXIT: {**random_site(8), "scale": torch.ones(3)}}),
    "too wide": (f"{EXIT}.down", {EXIT: random_site(17)}),
    "not an exit": ("model.layers.0.self_attn.q_proj", {"model.layers.0.self_attn.q_proj": random_site(8)}),
    "layer out of range": ("model.layers.2.mlp.down_proj", {"model.layers.2.mlp.down_proj": random_site(8)}),
    "half a norm": ("norm_after", {EXIT: {**random_site(8), "norm_after_weight": torch.ones(HIDDEN)}}),
    "a norm on one site": ("norm_after", {EXIT: random_site(8), FFN: random_site(8, norm_after=True)}),
    "overflow": (f"{EXIT}.up", {EXIT: {**random_site(8), "up": torch.full((HIDDEN, 8), 1e30), "scale": torch.tensor([1e30])}}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_bad_tensors_are_refused_by_name(why: str) -> None:
    field, sites = REFUSED[why]
    with pytest.raises(AdapterError) as caught:
        read(sites, limits=Limits(max_rank=16))
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), [("activation", "prelu"), ("activation", None), ("reads", "inlet"), ("skip", 2)])
def test_bad_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AdapterError) as caught:
        read({EXIT: random_site(8)}, **{field: value})
    assert caught.value.field == field


def test_a_base_of_unknown_layout_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match="'olmo2' is not known"):
        read({EXIT: random_site(8)}, base=base_shape("olmo2"))


# --- Layout ----------------------------------------------------------------------------------------------------------

_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}
_WIDE = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
_GQA = {**_WIDE, "num_key_value_heads": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": _GQA,
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 8},
    "gemma": {**_GQA, "head_dim": 8},
    "granite": {**_GQA, "residual_multiplier": 0.3},
    "smollm3": _GQA,
    "olmo": _GQA,
    "phi3": _GQA,
    "phi": _WIDE,
    "starcoder2": _GQA,
    "cohere": _GQA,
    "stablelm": {**_GQA, "use_parallel_residual": False},
    "stablelm parallel": {**_GQA, "use_parallel_residual": True},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32},
    "opt": {**_SIZES, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": HIDDEN},
    "gpt_neox": {**_WIDE, "use_parallel_residual": True},
    "gpt_neox sequential": {**_WIDE, "use_parallel_residual": False},
}
IDS = torch.arange(3, 15).view(2, 6)


def build(name: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(" ")[0], **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_every_architecture_of_the_table_is_tried() -> None:
    tried = {name.partition(" ")[0] for name in ARCHITECTURES}
    assert tried == {model_type for layout in LAYOUTS for model_type in layout.model_types}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_says_what_the_model_does(name: str) -> None:
    """exit's output is all that a sublayer adds to its residual, and the inlet reads the norm of that residual."""
    model = build(name)
    places = sublayers(model.config.model_type, 2, model.config.to_dict())
    given: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for module in {name for place in places for name in (place.residual, place.inlet, place.exit)}:
        target = model.get_submodule(module)
        target.register_forward_pre_hook(lambda _, args, at=module: given.__setitem__(at, args[0].view(-1, args[0].shape[-1])))
        target.register_forward_hook(lambda _, args, y, at=module: left.__setitem__(at, y.view(-1, y.shape[-1])))
    model(IDS, use_cache=False)
    step = getattr(model.config, "residual_multiplier", 1.0)
    assert [(place.layer, place.kind) for place in places] == [*product((0, 1), ("attention", "feed_forward"))]
    for place in places:
        assert torch.equal(given[place.inlet], left[place.residual])
    attention, feed_forward, following = places[:3]
    after_attention = given[attention.residual] + step * left[attention.exit]
    parallel = torch.equal(given[feed_forward.residual], given[attention.residual])
    assert parallel or torch.allclose(given[feed_forward.residual], after_attention, atol=1e-5)
    after_both = after_attention + step * left[feed_forward.exit]
    assert torch.allclose(given[following.residual], after_both, atol=1e-5)


def test_unknown_layouts_have_no_sublayers() -> None:
    assert sublayers("bert", 2) == sublayers("olmo2", 2) == sublayers("gemma2", 2) == ()
    assert sublayers("opt", 2) == sublayers("opt", 2, {"do_layer_norm_before": False}) == ()
    assert len(sublayers("opt", 3, {"do_layer_norm_before": True})) == 6
    assert sublayers("stablelm", 2) == ()


# --- In a model, against hooks by hand -------------------------------------------------------------------------------


def attach(model: PreTrainedModel, part: Part, base: BaseShape) -> None:
    """The part on every token, through hooks as the engine attaches them."""
    taps: dict[str, Tensor] = {}
    for module, site in part.sites.items():
        op = Bottleneck().op(part, module, base, CPU, torch.float32)
        op.grow(3)
        op.put(2, site)
        for name in op.taps:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: taps.__setitem__(name, args[0].flatten(0, -2))
            )

        def after(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, op: BottleneckOp = op) -> Tensor:
            rows = rows_of([2] * y.flatten(0, -2).shape[0])
            rows.taps = taps
            return op.after(args[0].flatten(0, -2), y.flatten(0, -2).clone(), rows).view_as(y)

        model.get_submodule(module).register_forward_hook(after)


def attach_by_hand(model: PreTrainedModel, form: Form, sites: Mapping[str, Tensors], base: BaseShape) -> None:
    """The oracle: residuals followed from each layer's input, no table of norms."""
    step = getattr(model.config, "residual_multiplier", 1.0)
    parallel = base.model_type in ("phi", "cohere") or getattr(model.config, "use_parallel_residual", False)
    stream: dict[str, Tensor] = {}
    for place in base.sublayers:
        layer = place.exit[: place.exit.index(f".{place.layer}.") + 2]
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args: stream.__setitem__("r", args[0]))

        def after(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, place: Any = place) -> Tensor:
            out = by_hand(form, y, stream["r"].view_as(y), sites[place.exit])
            if place.kind == "attention" and not parallel:
                stream["r"] = stream["r"] + step * out
            return out

        model.get_submodule(place.exit).register_forward_hook(after)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("reads", "skip"), [("output", 0), ("sum", 1), ("residual", -1)])
def test_equals_hooks_by_hand_in_every_architecture(name: str, reads: str, skip: int) -> None:
    plain, adapted, oracle = build(name), build(name), build(name)
    base = base_shape(plain.config.model_type, config=plain.config.to_dict())
    sites = {place.exit: random_site(5, seed=i) for i, place in enumerate(base.sublayers)}
    part = read(sites, base=base, activation="gelu_new", reads=reads, skip=skip)
    attach(adapted, part, base)
    attach_by_hand(oracle, Form.parse(str(part.pool)), sites, base)
    got, want = (model(IDS, use_cache=False).logits for model in (adapted, oracle))
    assert torch.allclose(got, want, atol=1e-4)
    assert (got - plain(IDS, use_cache=False).logits).abs().max() > 0.05
