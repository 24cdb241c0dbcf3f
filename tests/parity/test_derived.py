"""Adapters computed from others, in one batch with their sources: merges against PEFT's `add_weighted_adapter`, joins against
PEFT with several adapters active, and prefixes one after the other against the base with the same cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from adapters_store.digest import Digest
from server.methods.base import Adapter, Limits, Part, Prefix
from server.methods.merge import random_mask
from server.methods.read import read_adapter
from server.model.loader import make_base
from server.recipes import Join, Merge
from tests.lab import BASE, Lab
from tests.tiny import VOCAB, tiny_model

NEW = 8
PROMPT = [5, 9, 33, 60, 12, 71]
Logits = Callable[[list[int]], Tensor]

LORAS: Mapping[str, peft.LoraConfig] = {
    "a": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"]),
    "b": peft.LoraConfig(r=4, lora_alpha=3, target_modules=["v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]),
    "c": peft.LoraConfig(r=4, lora_alpha=4, target_modules=["v_proj", "up_proj", "lm_head"]),
}
IA3S: Mapping[str, peft.IA3Config] = {
    "a": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "b": peft.IA3Config(target_modules=["v_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Trained:
    """One PEFT model with several adapters, and each of them as the server reads it."""

    def __init__(self, configs: Mapping[str, peft.PeftConfig], home: Path) -> None:
        first, *others = configs
        self.model: Any = peft.get_peft_model(tiny_model("llama"), configs[first], first)
        for name in others:
            self.model.add_adapter(name, configs[name])
        generator = torch.Generator().manual_seed(3)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.data = noise + ("ia3_" in name)
        self.model.eval().save_pretrained(str(home), save_embedding_layers=False)
        shape = make_base(tiny_model("llama"), BASE, torch.device("cpu"), torch.float32).shape
        self.adapters = {
            name: read_adapter({path.name: path for path in (home / name).iterdir()}, shape, Limits(), Digest.of(name.encode()))
            for name in configs
        }

    def digest(self, name: str) -> Digest:
        return self.adapters[name].digest

    def lab(self, *more: Adapter) -> Lab:
        return Lab(tiny_model("llama"), {adapter.digest: adapter for adapter in (*self.adapters.values(), *more)})

    def active(self, *names: str) -> Logits:
        @torch.inference_mode()
        def run(ids: list[int]) -> Tensor:
            self.model.base_model.set_adapter(list(names))
            logits: Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
            return logits

        return run


@pytest.fixture
def loras(tmp_path: Path) -> Trained:
    return Trained(LORAS, tmp_path)


def check(lab: Lab, id: str, oracle: Logits, prompt: list[int] = PROMPT) -> None:
    ids, rows = list(prompt), []
    for _ in range(NEW):
        rows.append(oracle(ids)[-1])
        ids.append(int(rows[-1].argmax()))
    assert lab.finished(id), lab.ending(id).error
    assert lab.tokens(id) == ids[len(prompt) :], id
    assert (lab.logits(id) - torch.stack(rows)).abs().max() < 1e-3, id


def prune_as_the_server_does(model: nn.Module, recipe: Merge, names: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """Have PEFT prune with the masks of `recipe`, found by which matrix it asks for: its own are drawn anew each time."""
    places = {}
    for name, parameter in model.named_parameters():
        for index, adapter in enumerate(names):
            for side in "AB":
                for end in (f".lora_{side}.{adapter}.weight", f".lora_embedding_{side}.{adapter}"):
                    if name.endswith(end):
                        module = name.removeprefix("base_model.model.").removesuffix(end)
                        places[parameter.data_ptr()] = f"{module}.{side}", index

    def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return tensor * random_mask(recipe, *places[tensor.data_ptr()], tensor) / density

    patch.setattr(merge_utils, "random_pruning", random_pruning)


# -- merges ----------------------------------------------------------------------------------------------------------

MERGES = {
    "linear": Merge((), (0.7, 0.6), "linear"),
    "linear_negative": Merge((), (1.0, -0.5), "linear"),
    "linear_three": Merge((), (0.5, 0.5, 1.5), "linear"),
    "linear_none_of_one": Merge((), (0.0, 1.0), "linear"),
    "ties": Merge((), (1.0, 0.8), "ties", 0.5),
    "ties_dense": Merge((), (1.0, 0.8), "ties", 1.0),
    "ties_frequency": Merge((), (1.0, 0.3, 0.7), "ties", 0.4, "frequency"),
    "ties_negative": Merge((), (1.0, -0.8, 0.5), "ties", 0.7),
    "dare_linear": Merge((), (1.0, 0.6), "dare_linear", 0.5),
    "dare_linear_dense": Merge((), (1.0, 0.6), "dare_linear", 1.0),
    "dare_ties": Merge((), (1.0, 0.6, 0.4), "dare_ties", 0.6),
    "dare_ties_frequency": Merge((), (1.0, 0.6, 0.4), "dare_ties", 0.6, "frequency"),
    "ties_of_one": Merge((), (0.5,), "ties", 0.5),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_pefts(name: str, loras: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    form = MERGES[name]
    names = tuple("abc"[: len(form.weights)])
    recipe = Merge(tuple(map(loras.digest, names)), form.weights, form.strategy, form.density, form.majority_sign_method)
    prune_as_the_server_does(loras.model, recipe, names, monkeypatch)
    loras.model.add_weighted_adapter(
        list(names),
        list(form.weights),
        "merged",
        combination_type=form.strategy,
        density=form.density,
        majority_sign_method=form.majority_sign_method,
    )
    lab = loras.lab()
    lab.submit("merged", PROMPT, recipe, max_new_tokens=NEW)
    lab.run()
    check(lab, "merged", loras.active("merged"))


def test_merges_and_their_sources_share_a_batch(loras: Trained) -> None:
    merges = {
        name: Merge((loras.digest("a"), loras.digest("b")), weights, "linear")
        for name, weights in (("even", (0.5, 0.5)), ("mostly_a", (0.9, 0.1)))
    }
    for name, recipe in merges.items():
        loras.model.add_weighted_adapter(["a", "b"], list(recipe.weights), name, combination_type="linear")
    generator = torch.Generator().manual_seed(1)
    names = ["a", "even", "b", "mostly_a", "c", "even", "a", "mostly_a"]
    prompts = [torch.randint(3, VOCAB, (5 + 3 * i,), generator=generator).tolist() for i in range(len(names))]
    lab = loras.lab()
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        lab.submit(f"{index}", prompt, merges.get(name) or loras.digest(name), max_new_tokens=NEW)
        lab.turn()
    lab.run()
    assert max(lab.observer.adapters_per_step) == 5
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        check(lab, f"{index}", loras.active(name), prompt)


def test_a_merge_of_one_rank_stabilised_adapter_is_that_adapter(tmp_path: Path) -> None:
    trained = Trained({"a": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True)}, tmp_path)
    lab = trained.lab()
    lab.submit("merged", PROMPT, Merge((trained.digest("a"),), (1.0,)), max_new_tokens=NEW)
    lab.run()
    check(lab, "merged", trained.active("a"))


# -- joins -----------------------------------------------------------------------------------------------------------


def test_two_loras_of_one_pool_add_up_exactly(loras: Trained) -> None:
    lab = loras.lab()
    lab.submit("joined", PROMPT, Join((loras.digest("a"), loras.digest("b"))), max_new_tokens=NEW)
    lab.submit("a", PROMPT, loras.digest("a"), max_new_tokens=NEW)
    lab.submit("three", PROMPT, Join(tuple(map(loras.digest, "abc"))), max_new_tokens=NEW)
    lab.run()
    check(lab, "joined", loras.active("a", "b"))
    check(lab, "three", loras.active("a", "b", "c"))
    check(lab, "a", loras.active("a"))


def test_a_merge_and_an_adapter_join(loras: Trained) -> None:
    merge = Merge((loras.digest("a"), loras.digest("b")), (0.5, 0.7))
    loras.model.add_weighted_adapter(["a", "b"], [0.5, 0.7], "merged", combination_type="linear")
    lab = loras.lab()
    lab.submit("joined", PROMPT, Join((merge, loras.digest("c"))), max_new_tokens=NEW)
    lab.run()
    check(lab, "joined", loras.active("merged", "c"))


def test_two_ia3_multiply(tmp_path: Path) -> None:
    trained = Trained(IA3S, tmp_path)
    lab = trained.lab()
    lab.submit("joined", PROMPT, Join((trained.digest("a"), trained.digest("b"))), max_new_tokens=NEW)
    lab.submit("b", PROMPT, trained.digest("b"), max_new_tokens=NEW)
    lab.run()
    check(lab, "joined", trained.active("a", "b"))
    check(lab, "b", trained.active("b"))


def test_a_soft_prompt_runs_through_all_that_is_joined(loras: Trained) -> None:
    """The user's adapter is a LoRA and a soft prompt, the tenant's a LoRA: the prompt's K/V must depend on both LoRAs."""
    embeddings = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    own = Adapter(
        Digest.of(b"own"), (*loras.adapters["b"].parts, Part("prompt_tuning", prefix=Prefix(3, embeddings=embeddings)))
    )
    embed = loras.model.get_input_embeddings()

    @torch.inference_mode()
    def oracle(ids: list[int]) -> Tensor:
        loras.model.base_model.set_adapter(["a", "b"])
        logits: Tensor = loras.model(inputs_embeds=torch.cat((embeddings, embed(torch.tensor(ids))))[None]).logits[0]
        return logits

    lab = loras.lab(own)
    lab.submit("joined", PROMPT, Join((loras.digest("a"), own.digest)), max_new_tokens=NEW)
    lab.submit("own", PROMPT, own.digest, max_new_tokens=NEW)
    lab.run()
    check(lab, "joined", oracle)
    assert not torch.equal(lab.logits("own"), lab.logits("joined"))


# -- two prefixes ----------------------------------------------------------------------------------------------------


def kv(seed: int, length: int, positions: int | None = None) -> Adapter:
    keys, values = torch.randn(2, 2, length, 2, 8, generator=torch.Generator().manual_seed(seed))
    part = Part("prefix_tuning", prefix=Prefix(length, keys, values, positions=positions))
    return Adapter(Digest.of(f"kv{seed}".encode()), (part,))


def soft(seed: int, length: int) -> Adapter:
    embeddings = torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))
    return Adapter(Digest.of(f"soft{seed}".encode()), (Part("prompt_tuning", prefix=Prefix(length, embeddings=embeddings)),))


@torch.inference_mode()
def behind_cache(model: PreTrainedModel, prefixes: list[Prefix], first: int, ids: list[int]) -> Tensor:
    """The base's logits with these keys and values in its cache and the text at position `first`."""
    cache = DynamicCache()
    for layer in range(2):
        keys, values = (
            torch.cat([getattr(prefix, side)[layer] for prefix in prefixes]).transpose(0, 1)[None]
            for side in ("keys", "values")
        )
        cache.update(keys, values, layer)
    positions = torch.arange(first, first + len(ids))[None]
    logits: Tensor = model(input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=positions).logits[0]
    return logits


@pytest.mark.parametrize(("positions", "first"), [((None, None), 8), ((0, None), 3), ((0, 0), 0)])
def test_two_stored_prefixes_follow_one_another(positions: tuple[int | None, int | None], first: int) -> None:
    model, one, two = tiny_model("llama"), kv(1, 5, positions[0]), kv(2, 3, positions[1])
    lab = Lab(tiny_model("llama"), {one.digest: one, two.digest: two})
    lab.submit("joined", PROMPT, Join((one.digest, two.digest)), max_new_tokens=NEW)
    lab.submit("one", PROMPT, one.digest, max_new_tokens=NEW)
    lab.run()
    prefixes = [adapter.prefix for adapter in (one, two) if adapter.prefix is not None]
    check(lab, "joined", lambda ids: behind_cache(model, prefixes, first, ids))
    check(lab, "one", lambda ids: behind_cache(model, prefixes[:1], 5 if positions[0] is None else 0, ids))


def test_two_soft_prompts_are_run_as_one() -> None:
    model: Any = tiny_model("llama")
    one, two, embed = soft(1, 5), soft(2, 3), model.get_input_embeddings()
    prompts = [adapter.prefix.embeddings for adapter in (two, one) if adapter.prefix and adapter.prefix.embeddings is not None]

    @torch.inference_mode()
    def oracle(ids: list[int]) -> Tensor:
        logits: Tensor = model(inputs_embeds=torch.cat((*prompts, embed(torch.tensor(ids))))[None]).logits[0]
        return logits

    lab = Lab(tiny_model("llama"), {one.digest: one, two.digest: two})
    lab.submit("two_one", PROMPT, Join((two.digest, one.digest)), max_new_tokens=NEW)
    lab.submit("one_two", PROMPT, Join((one.digest, two.digest)), max_new_tokens=NEW)
    lab.run()
    check(lab, "two_one", oracle)
    assert not torch.equal(lab.logits("one_two"), lab.logits("two_one"))
