"""What PEFT stores whole beside an adapter, or row by row: equal to what PEFT itself loads, among each other in one batch.

The configurations here depend on shared weights (embedding and output head), which `configs.py` leaves alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters_store.digest import Digest
from server.methods.base import Adapter, Limits, Part
from server.methods.read import read_adapter
from server.model.kernels import Kernels
from server.model.loader import make_base
from tests.lab import BASE, Lab
from tests.tiny import VOCAB, tiny_model

NEW = 8
RANKS = {f"model.layers.{i}.self_attn.q_proj.lora_E": [True, i == 0, True, False] for i in range(2)}

Make = Callable[[], peft.PeftConfig]
Row = tuple[Adapter | None, list[int], list[int], Tensor]  # adapter, prompt, the oracle's tokens and logits
Zoo = tuple[str, dict[str, Row]]  # architecture, rows by name


def lora(*targets: str, **more: Any) -> Make:
    return lambda: peft.LoraConfig(r=3, target_modules=list(targets), **more)


TIED: Mapping[str, Make] = {
    "embedding alone": lora("q_proj", modules_to_save=["embed_tokens"]),
    "head alone": lora("q_proj", modules_to_save=["lm_head"]),
    "both, untied by the adapter": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "kept tied": lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "kept tied by the head": lora("q_proj", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "rows of both": lora("q_proj", trainable_token_indices=[9, 5, 33]),
    "other rows of each": lora("q_proj", trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}),
    "the same rows of each": lora("q_proj", trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [5, 9]}),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[70, 5, 9, 3]),
    "tokens of the head": lambda: peft.TrainableTokensConfig(token_indices=[5, 9, 3], target_modules=["lm_head"]),
    "norms that store their distance from 1": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}
UNTIED: Mapping[str, Make] = {
    "embedding, head, norms": lora("q_proj", modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "a container": lora("q_proj", modules_to_save=["mlp"]),
    "rows of each": lora("q_proj", trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}),
    "tokens of both": lambda: peft.TrainableTokensConfig(token_indices=[5, 3], target_modules=["lm_head", "embed_tokens"]),
    "tokens by pattern": lambda: peft.TrainableTokensConfig(token_indices=[5, 3], target_modules=r".*embed_\w+"),
    "ln_tuning of a linear": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    ),
    "beft and norms": lambda: peft.BeftConfig(target_modules=["v_proj"], modules_to_save=["norm"]),
    "ia3 on the head": lambda: peft.IA3Config(target_modules=["lm_head", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 into the head": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"]),
    "beft on the head": lambda: peft.BeftConfig(target_modules=["lm_head"]),
    "prompt and head": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head", "norm"]),
    "prefix and norms": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=["norm"]),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"], modules_to_save=["norm"]),
    "adalora, ranks allocated": lambda: peft.AdaLoraConfig(
        total_step=10, init_r=4, lora_alpha=6, target_modules=["q_proj"], rank_pattern=RANKS
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
}
GPT2: Mapping[str, Make] = {
    "Conv1D, norm, embedding": lora("c_attn", modules_to_save=["c_fc", "ln_f", "wte"]),
    "positions": lora("c_attn", modules_to_save=["wpe"]),
    "ia3 and head": lambda: peft.IA3Config(
        target_modules=r".*(c_attn|mlp\.c_proj)", feedforward_modules=r".*mlp\.c_proj", modules_to_save=["lm_head"]
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 9, 3, 70]),
}
OPT: Mapping[str, Make] = {
    "every bias, and norms whole": lora("q_proj", bias="all", modules_to_save=["final_layer_norm"]),
    "adalora, every bias": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"], bias="all"),
    "vera, its biases": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "fc1"], bias="vera_only"),
    "vera, every bias": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "norms with biases": lambda: peft.LNTuningConfig(target_modules=["final_layer_norm", "self_attn_layer_norm"]),
    "a linear with a bias": lora("q_proj", modules_to_save=["fc2"]),
}
ZOOS = {"gemma": TIED, "gemma3_text": TIED, "llama": UNTIED, "gpt2": GPT2, "opt": OPT}


def saved(architecture: str, make: Make, directory: Path, **save: Any) -> nn.Module:
    """The adapter, its values random, saved into `directory`; what PEFT loads from there is the oracle."""
    config: Any = make()
    config.task_type = peft.TaskType.CAUSAL_LM
    masks = getattr(config, "rank_pattern", None) if isinstance(config, peft.AdaLoraConfig) else None
    if masks:
        config.rank_pattern = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model(architecture), config)
        generator = torch.Generator().manual_seed(len(str(directory)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(mean=1.0 if "ia3" in name else 0.0, std=0.3, generator=generator)
        if masks:
            config.rank_pattern = masks
        model.save_pretrained(str(directory), **save)
        return peft.PeftModel.from_pretrained(tiny_model(architecture), directory).eval()


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int]) -> tuple[list[int], Tensor]:
    ids, rows = list(prompt), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(NEW):
            rows.append(model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1])
            ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def read(architecture: str, directory: Path, name: str) -> Adapter:
    base = make_base(tiny_model(architecture), BASE, torch.device("cpu"), torch.float32).shape
    return read_adapter({path.name: path for path in directory.iterdir()}, base, Limits(), Digest.of(name.encode()))


@pytest.fixture(scope="module", params=ZOOS)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Every adapter of one architecture, and the base itself under "base"."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Row] = {}
    for i, (name, make) in enumerate(ZOOS[request.param].items()):
        home = tmp_path_factory.mktemp("adapter")
        oracle = saved(request.param, make, home)
        prompt = [5, 9, *torch.randint(3, VOCAB, (3 + 2 * i,), generator=generator).tolist()]
        found[name] = (read(request.param, home, name), prompt, *greedy(oracle, prompt))
    found["base"] = (None, [5, 9, 3], *greedy(tiny_model(request.param), [5, 9, 3]))
    return request.param, found


def submit_all(lab: Lab, zoo: Mapping[str, Row]) -> None:
    for name, (adapter, prompt, _, _) in zoo.items():
        lab.submit(name, prompt, *([adapter.digest] if adapter else []), max_new_tokens=NEW)
        lab.turn()
    lab.run()


def check(lab: Lab, zoo: Mapping[str, Row]) -> None:
    for name, (_, _, tokens, logits) in zoo.items():
        assert lab.tokens(name) == tokens, name
        assert (lab.logits(name) - logits).abs().max() < 1e-3, name


@pytest.mark.parametrize("budget", [5, 64])
def test_mixed_staggered_chunked(zoo: Zoo, kernels: Kernels, budget: int) -> None:
    architecture, specimens = zoo
    adapters = {adapter.digest: adapter for adapter, *_ in specimens.values() if adapter}
    lab = Lab(tiny_model(architecture), adapters, kernels=kernels, max_batch_tokens=budget, slots=32)
    submit_all(lab, specimens)
    check(lab, specimens)


def test_few_slots_are_handed_on(zoo: Zoo) -> None:
    architecture, specimens = zoo
    adapters = {adapter.digest: adapter for adapter, *_ in specimens.values() if adapter}
    lab = Lab(tiny_model(architecture), adapters, slots=2)
    submit_all(lab, specimens)
    check(lab, specimens)
    assert lab.observer.evictions > 0


def test_nan_stays_with_its_own_row(zoo: Zoo, kernels: Kernels) -> None:
    architecture, specimens = zoo
    adapters = {adapter.digest: adapter for adapter, *_ in specimens.values() if adapter}
    broken = [poisoned(adapter) for adapter in adapters.values()]
    lab = Lab(
        tiny_model(architecture), {**adapters, **{a.digest: a for a in broken}}, kernels=kernels, slots=64, max_batch_tokens=64
    )
    for adapter in broken:
        lab.submit(adapter.digest, [5, 9, 5], adapter.digest)
    submit_all(lab, specimens)
    check(lab, specimens)
    assert all("not finite" in str(lab.ending(adapter.digest).error) for adapter in broken)


def poisoned(adapter: Adapter) -> Adapter:
    def bad(part: Part) -> Part:
        sites = {
            module: {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in tensors.items()}
            for module, tensors in part.sites.items()
        }
        return replace(part, sites=sites)

    return Adapter(Digest.of(b"nan " + adapter.digest.encode()), tuple(bad(part) for part in adapter.parts))


def test_the_oracles_differ_from_the_base(zoo: Zoo) -> None:
    architecture, specimens = zoo
    for name, (_, prompt, _, logits) in specimens.items():
        if name != "base":
            assert (greedy(copy.deepcopy(tiny_model(architecture)), prompt)[1][0] - logits[0]).abs().max() > 0.05, name


@pytest.mark.parametrize("architecture", ["gemma", "llama"])
def test_embeddings_saved_unasked_are_the_bases_own_or_replace_it(architecture: str, tmp_path: Path) -> None:
    """save_embedding_layers writes what `modules_to_save` does not name; PEFT loads it over the base, tied head and all."""
    saved(architecture, lora("q_proj"), tmp_path / "same", save_embedding_layers=True)
    assert [part.method for part in read(architecture, tmp_path / "same", "same").parts] == ["lora", "full"]
    assert not read(architecture, tmp_path / "same", "same").parts[1].sites

    saved(architecture, lora("q_proj"), tmp_path / "other", save_embedding_layers=True)
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.weight"] *= 0.8
    tensors["base_model.model.lm_head.weight"] *= 0.8
    save_file(tensors, file, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "other").eval()
    adapter = read(architecture, tmp_path / "other", "other")
    lab = Lab(tiny_model(architecture), {adapter.digest: adapter})
    lab.submit("a", [5, 6, 7], adapter.digest, max_new_tokens=NEW)
    lab.run()
    tokens, logits = greedy(oracle, [5, 6, 7])
    assert lab.tokens("a") == tokens
    assert (lab.logits("a") - logits).abs().max() < 1e-3
