"""Fleet: adapters of every family as files for uploading, beside what the library that defines them answers.

One base in memory serves as the oracle of all of them: each adapter is put on, asked, saved and taken off again.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from server.model.text import Text
from tests.e2e.bottleneck import Files, wearing_bottlenecks

TOLERANCE = 1e-3  # of log-probabilities
LABELS = 3

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # a llama's
_TEMPLATE = "It was said: {input} And so"  # a discrete prompt's


@dataclass(frozen=True)
class Answer:
    """A greedy continuation, or labels from the likeliest down, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]

    def same(self, other: Answer) -> bool:
        return self.tokens == other.tokens and self.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


@dataclass(frozen=True)
class Member:
    """One adapter: its files and the answers it has to give, by prompt."""

    name: str
    family: str
    files: Files
    answers: Mapping[str, Answer]

    def request(self, prompt: str) -> tuple[str, Any]:
        """The route and the body that ask for one of its answers."""
        if self.family == "head":
            return "/classify", {"inputs": prompt, "adapter_id": self.name}
        task = {"task_id": TASK} if self.family == "multitask_prompt_tuning" else {}
        return generation(self.name, prompt, len(self.answers[prompt].tokens), **task)


def generation(adapter: str | None, prompt: str, count: int, **more: object) -> tuple[str, Any]:
    parameters = {"adapter_id": adapter, "max_new_tokens": count, "ignore_eos_token": True, "details": True, **more}
    return "/generate", {"inputs": prompt, "parameters": parameters}


def answer_of(body: Any) -> Answer:
    """What a server said, of either route."""
    if isinstance(body, list):
        labels = [int(entry["label"].removeprefix("LABEL_")) for entry in body]
        return Answer(labels, [math.log(entry["score"]) for entry in body])
    tokens = body["details"]["tokens"]
    return Answer([token["id"] for token in tokens], [token["logprob"] for token in tokens])


#: What makes PEFT's config; given a few token ids that prompts hold.
Make = Callable[[list[int]], peft.PeftConfig]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made: its family, and what that needs to know."""

    family: str
    config: Make | None = None  # PEFT's families
    parallel: bool = False  # bottlenecks


def _lora(rank: int, family: str = "lora", **options: Any) -> Recipe:
    fields = {"lora_alpha": rank, "target_modules": "all-linear", **options}
    return Recipe(family, lambda ids: peft.LoraConfig(r=rank, **fields))


def _cpt(ids: list[int]) -> peft.PeftConfig:
    mask = [1] * len(ids)
    return peft.CPTConfig(
        task_type="CAUSAL_LM",  # type: ignore[arg-type]
        cpt_token_ids=ids,
        cpt_mask=mask,
        cpt_tokens_type_mask=mask,
        opt_projection_epsilon=50.0,  # how far training may go
    )


TASK = 1  # which of the multitask prompt's is asked
_TASKS = peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3, num_ranks=2)
_NARROW = {"target_modules": ["q_proj"], "layers_to_transform": [0]}

#: Every family, and of LoRA several ranks, scales and choices of modules.
RECIPES: tuple[Recipe, ...] = (
    _lora(4, lora_alpha=8),
    Recipe("ia3", lambda ids: peft.IA3Config()),
    Recipe("prefix_tuning", lambda ids: peft.PrefixTuningConfig(num_virtual_tokens=5)),
    Recipe("bottleneck"),
    _lora(12, use_rslora=True, layers_to_transform=[1], target_modules=["q_proj", "down_proj"]),
    Recipe("prompt_tuning", lambda ids: peft.PromptTuningConfig(num_virtual_tokens=6)),
    Recipe("bitfit"),
    _lora(16),
    Recipe("p_tuning", lambda ids: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16)),
    Recipe("bottleneck", parallel=True),
    _lora(4, "dora", use_dora=True, layers_to_transform=[0, 1], target_modules=["q_proj", "down_proj"]),
    Recipe("ln_tuning", lambda ids: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    _lora(2, "full", modules_to_save=["layers.1.self_attn.o_proj"], **_NARROW),
    Recipe("trainable_tokens", lambda ids: peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens"])),
    Recipe("cpt", _cpt),
    Recipe("multitask_prompt_tuning", lambda ids: _TASKS),
    Recipe("discrete_prompt"),
    _lora(4, "head", task_type="SEQ_CLS", **_NARROW),
)


class Fleet:
    """Makes members on one base. `strength` is how far an adapter is from the identity: too little shows no mistake.

    Usage:
        fleet = Fleet(directory, strength=0.3)
        member = fleet.make("a", RECIPES[0], seed=1, prompts=["hello"], count=8)
    """

    def __init__(self, base: Path, strength: float) -> None:
        torch.set_num_threads(1)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        self._model = model.eval()
        self._model.requires_grad_(False)
        self._model.generation_config.eos_token_id = None  # the requests ignore it too
        tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self._text = Text(tokenizer)
        self._strength = strength

    def make(self, name: str, recipe: Recipe, seed: int, prompts: Sequence[str], count: int) -> Member:
        """A member with `count` new tokens, or its labels, for each prompt."""
        ids = sorted({id for prompt in prompts for id in self._text.encode(prompt, special=False)[:3]})
        with self._wearing(recipe, ids, torch.Generator().manual_seed(seed)) as (oracle, files):
            ask = self._classify if recipe.family == "head" else self._generate
            answers = {prompt: ask(oracle, recipe, prompt, count) for prompt in prompts}
        return Member(name, recipe.family, files, answers)

    def base(self, prompts: Sequence[str], count: int) -> Mapping[str, Answer]:
        """What the base says without any adapter."""
        return {prompt: self._generate(self._model, Recipe("base"), prompt, count) for prompt in prompts}

    # -- asking

    def framed(self, template: str, line: str) -> Tensor:
        """Ids [1, T] of a line inside a discrete prompt's template, tokenised piece by piece."""
        head, tail = template.split("{input}")
        pieces = ((head, True), (line, False), (tail, False))
        return torch.tensor([[id for piece, first in pieces for id in self._text.encode_piece(piece, first)]])

    def label_logits(self, ids: Tensor, head: Tensor) -> Tensor:
        """[labels] of transformers' own sequence classifier with that `score.weight`, for ids [1, T]."""
        classifier = self._classifier(len(head))
        classifier.score.weight.data.copy_(head)
        with torch.inference_mode():
            return classifier(input_ids=ids).logits[0]  # type: ignore[no-any-return]

    def word_logprobs(self, ids: Tensor, words: Sequence[str]) -> Tensor:
        """[words] of the base itself: how likely each word, one token long, comes next."""
        wanted = [id for word in words for id in self._text.encode(word, special=False)]
        with torch.inference_mode():
            return self._model(input_ids=ids).logits[0, -1].log_softmax(-1)[wanted]  # type: ignore[no-any-return]

    def _ids(self, recipe: Recipe, prompt: str) -> Tensor:
        """[1, T]"""
        if recipe.family == "discrete_prompt":
            return self.framed(_TEMPLATE, prompt)
        return torch.tensor([self._text.encode(prompt)])

    def _generate(self, oracle: Any, recipe: Recipe, prompt: str, count: int) -> Answer:
        ids = self._ids(recipe, prompt)
        task = {"task_ids": torch.tensor([TASK])} if recipe.family == "multitask_prompt_tuning" else {}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = oracle.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **task,
            )
        tokens = made.sequences[0, -count:].tolist()
        scores = torch.cat(made.logits).log_softmax(-1)  # [count, V]
        return Answer(tokens, scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())

    def _classify(self, oracle: Any, recipe: Recipe, prompt: str, count: int) -> Answer:
        with torch.inference_mode():
            logprobs = oracle(input_ids=self._ids(recipe, prompt)).logits[0].log_softmax(-1)
        order = logprobs.argsort(descending=True)
        return Answer(order.tolist(), logprobs[order].tolist())

    # -- wearing

    @contextmanager
    def _wearing(self, recipe: Recipe, ids: list[int], random: torch.Generator) -> Iterator[tuple[Any, Files]]:
        if recipe.config is not None:
            # A copy: PEFT writes the base's sizes into a config, which may be one that another base will use too.
            with self._peft(recipe, copy.deepcopy(recipe.config(ids)), random) as worn:
                yield worn
        elif recipe.family == "bitfit":
            with self._bitfit(random) as worn:
                yield worn
        elif recipe.family == "discrete_prompt":
            config = {"peft_type": "DISCRETE_PROMPT", "template": _TEMPLATE}
            yield self._model, {"adapter_config.json": json.dumps(config).encode()}
        else:
            with wearing_bottlenecks(self._model, recipe.parallel, self._strength, random) as files:
                yield self._model, files

    @contextmanager
    def _peft(self, recipe: Recipe, config: peft.PeftConfig, random: torch.Generator) -> Iterator[tuple[Any, Files]]:
        """PEFT itself, and the files it saves."""
        model = self._classifier(LABELS) if recipe.family == "head" else self._model
        config.task_type = config.task_type or peft.TaskType.CAUSAL_LM
        with _as_it_was(self._model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = peft.get_peft_model(model, config).eval()
            with torch.no_grad():
                for name, parameter in oracle.named_parameters():
                    if parameter.requires_grad:
                        self._train(name, parameter, random)
            yield oracle, _saved(oracle)

    def _train(self, name: str, parameter: Tensor, random: torch.Generator) -> None:
        """Set one parameter as if it had been trained."""
        noise = torch.randn(parameter.shape, generator=random)
        if "prompt_encoder" in name:
            spread = 1.0 if parameter.shape[-1] > self._model.config.hidden_size else 0.5  # prefixes are keys and values
            parameter.copy_(noise * spread)
        elif "lora_magnitude" in name or "ia3_" in name:
            parameter.mul_(1 + noise * self._strength)
        elif "lora_" in name:
            parameter.copy_(noise * self._strength)
        else:  # copies of the base's own
            parameter.add_(noise * self._strength)

    def _classifier(self, labels: int) -> Any:
        """transformers' classifier over this very base; its head is there to be trained."""
        names = {index: f"LABEL_{index}" for index in range(labels)}
        config = type(self._model.config).from_dict({**self._model.config.to_dict(), "id2label": names})
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        classifier.model = self._model.model
        classifier.score = nn.Linear(config.hidden_size, labels, bias=False)
        return classifier

    @contextmanager
    def _bitfit(self, random: torch.Generator) -> Iterator[tuple[Any, Files]]:
        """The base with other biases: transformers is the oracle, there being no library for this family."""
        chosen = [(name, module) for name, module in self._layers() if name.endswith(_LINEAR)][::2]
        tensors = {}
        for name, module in chosen:
            bias = torch.randn(module.out_features, generator=random) * self._strength
            tensors[f"base_model.model.{name}.bias"] = bias
            module.bias = nn.Parameter(bias, requires_grad=False)
        config = json.dumps({"peft_type": "BITFIT"}).encode()
        try:
            yield self._model, {"adapter_config.json": config, "adapter_model.safetensors": save(tensors)}
        finally:
            for _, module in chosen:
                module.bias = None

    def _layers(self) -> Iterator[tuple[str, Any]]:
        yield from ((name, module) for name, module in self._model.named_modules() if isinstance(module, nn.Linear))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is again the one it was; PEFT's own `unload` leaves whole trained modules in place."""
    children = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    try:
        yield
    finally:
        for module, name, child in children:
            setattr(module, name, child)
        model.requires_grad_(False)


def _saved(model: peft.PeftModel) -> Files:
    """What save_pretrained writes."""
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}
