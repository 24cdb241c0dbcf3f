"""Fleet: adapters of every family as files for uploading, beside what the library that defines them answers.

One base in memory serves as the oracle of all of them: each adapter is put on, asked, saved and taken off again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Files = Mapping[str, bytes]

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # a llama's


@dataclass(frozen=True)
class Answer:
    """A greedy continuation and the log-probability of each of its tokens."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Member:
    """One adapter: its files and the answers it has to give, by prompt."""

    name: str
    family: str
    files: Files
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made: its family, and what that needs to know."""

    family: str
    config: Callable[[], peft.PeftConfig] | None = None  # PEFT's families
    parallel: bool = False  # bottlenecks


def _lora(rank: int, **options: Any) -> Recipe:
    return Recipe("lora", lambda: peft.LoraConfig(r=rank, **{"lora_alpha": rank, "target_modules": "all-linear", **options}))


#: Every family, and of LoRA several ranks, scales and choices of modules.
RECIPES: tuple[Recipe, ...] = (
    _lora(4, lora_alpha=8),
    Recipe("ia3", peft.IA3Config),
    Recipe("prefix_tuning", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5)),
    Recipe("bottleneck"),
    _lora(12, use_rslora=True, layers_to_transform=[1], target_modules=["q_proj", "down_proj"]),
    Recipe("prompt_tuning", lambda: peft.PromptTuningConfig(num_virtual_tokens=6)),
    Recipe("bitfit"),
    _lora(16),
    Recipe("p_tuning", lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16)),
    Recipe("bottleneck", parallel=True),
)


class Fleet:
    """Makes members on one base. `strength` is how far an adapter is from the identity: too little shows no mistake.

    Usage:
        fleet = Fleet(directory, strength=0.3)
        member = fleet.make("a", RECIPES[0], seed=1, prompts=["hello"], count=8)
    """

    def __init__(self, base: Path, strength: float) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True).eval()
        self._model.requires_grad_(False)
        self._model.generation_config.eos_token_id = None  # the requests ignore it too
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self._strength = strength

    def make(self, name: str, recipe: Recipe, seed: int, prompts: Sequence[str], count: int) -> Member:
        """A member with `count` new tokens for each prompt."""
        with self._wearing(recipe, torch.Generator().manual_seed(seed)) as (oracle, files):
            answers = {prompt: self.ask(oracle, prompt, count) for prompt in prompts}
        return Member(name, recipe.family, files, answers)

    def base(self, prompts: Sequence[str], count: int) -> Mapping[str, Answer]:
        """What the base says without any adapter."""
        return {prompt: self.ask(self._model, prompt, count) for prompt in prompts}

    def ask(self, oracle: nn.Module, prompt: str, count: int) -> Answer:
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = oracle.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = made.sequences[0, -count:].tolist()
        scores = torch.cat(made.logits).log_softmax(-1)  # [count, V]
        return Answer(tokens, scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist())

    @contextmanager
    def _wearing(self, recipe: Recipe, random: torch.Generator) -> Iterator[tuple[nn.Module, Files]]:
        if recipe.config is not None:
            with self._peft(recipe.config(), random) as worn:
                yield worn
        elif recipe.family == "bitfit":
            with self._bitfit(random) as worn:
                yield worn
        else:
            with self._bottleneck(recipe.parallel, random) as worn:
                yield worn

    @contextmanager
    def _peft(self, config: peft.PeftConfig, random: torch.Generator) -> Iterator[tuple[nn.Module, Files]]:
        """PEFT itself, and the files it saves."""
        config.task_type = peft.TaskType.CAUSAL_LM
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = peft.get_peft_model(self._model, config).eval()
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                self._train(name, parameter, random)
        try:
            yield oracle, _saved(oracle)
        finally:
            if not config.is_prompt_learning:
                oracle.unload()

    def _train(self, name: str, parameter: Tensor, random: torch.Generator) -> None:
        """Set one parameter as if it had been trained."""
        noise = torch.randn(parameter.shape, generator=random)
        if "ia3_" in name:
            parameter.copy_(1 + noise * self._strength)
        elif "lora_" in name:
            parameter.copy_(noise * self._strength)
        elif "prompt_encoder" in name:
            spread = 1.0 if parameter.shape[-1] > self._model.config.hidden_size else 0.5  # prefixes are keys and values
            parameter.copy_(noise * spread)

    @contextmanager
    def _bitfit(self, random: torch.Generator) -> Iterator[tuple[nn.Module, Files]]:
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

    @contextmanager
    def _bottleneck(self, parallel: bool, random: torch.Generator) -> Iterator[tuple[nn.Module, Files]]:
        """AdapterHub's files for double_seq_bn or par_bn; its published formula, by hooks, is the oracle.

        That library cannot be installed beside this transformers; tests/golden holds what it computes.
        """
        hidden, width = self._model.config.hidden_size, self._model.config.hidden_size // 8
        tensors: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for index, layer in enumerate(self._model.model.layers):
                places = (("output_adapters", layer.post_attention_layernorm, layer.mlp.down_proj),)
                if not parallel:
                    places = (("attention_adapters", layer.input_layernorm, layer.self_attn.o_proj), *places)
                for place, norm, exit_ in places:
                    site = _site(hidden, width, self._strength, random)
                    path = f"model.layers.{index}.{place}.adapters.fleet"
                    tensors |= {f"{path}.{name}": tensor for name, tensor in site.items()}
                    for handle in _hook(site, norm, exit_, parallel):
                        hooks.callback(handle.remove)
            config = {"config": _PAR_BN if parallel else _DOUBLE_SEQ_BN, **_INTERFACE, "hidden_size": hidden}
            yield self._model, {"adapter_config.json": json.dumps(config).encode(), "adapter.safetensors": save(tensors)}

    def _layers(self) -> Iterator[tuple[str, Any]]:
        yield from ((name, module) for name, module in self._model.named_modules() if isinstance(module, nn.Linear))


def _saved(model: peft.PeftModel) -> Files:
    """What save_pretrained writes."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def _site(hidden: int, width: int, strength: float, random: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    return {name: torch.randn(*shape, generator=random) * strength for name, shape in shapes.items()}


def _hook(site: Mapping[str, Tensor], norm: nn.Module, exit_: nn.Module, parallel: bool) -> Iterator[Any]:
    """y + up(silu(down(y))) after a sublayer, or y + 4 up(relu(down(x))) where x is what the sublayer's norm reads."""
    seen: list[Tensor] = []
    down, up = (
        lambda x: nn.functional.linear(x, site["adapter_down.0.weight"], site["adapter_down.0.bias"]),
        lambda x: nn.functional.linear(x, site["adapter_up.weight"], site["adapter_up.bias"]),
    )

    def formula(module: nn.Module, args: object, y: Tensor) -> Tensor:
        if parallel:
            return y + 4 * up(torch.relu(down(seen.pop())))
        return y + up(nn.functional.silu(down(y)))

    if parallel:
        yield norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    yield exit_.register_forward_hook(formula)


_DOUBLE_SEQ_BN: Mapping[str, object] = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 8,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
}
_PAR_BN: Mapping[str, object] = {
    **_DOUBLE_SEQ_BN,
    "mh_adapter": False,
    "non_linearity": "relu",
    "is_parallel": True,
    "scaling": 4.0,
}
_INTERFACE: Mapping[str, object] = {
    "model_class": "LlamaForCausalLM",
    "model_name": "",
    "model_type": "llama",
    "name": "fleet",
    "version": "adapters.1.3.0",
}
