"""Hugging Face `generate()`, through PEFT's `adapter_names` where there are adapters; fp32."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from .lines import Names, Rows, serve, stopwatch


class HuggingFace:
    """One model; PEFT around it when it was given adapters."""

    def __init__(self, model: Any, adapted: bool) -> None:
        self._model = model
        self._adapted = adapted
        self.version = f"transformers {version('transformers')}" + (f", peft {version('peft')}" if adapted else "")

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        ids = torch.tensor(prompts)
        names = {"adapter_names": [name or "__base__" for name in adapters]} if self._adapted else {}
        with torch.inference_mode(), stopwatch() as seconds:
            out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **names)
        return seconds(), out[:, ids.shape[1] :].tolist()


def load(base: str, adapters: dict[str, str], rows: int, tokens: int, threads: int) -> HuggingFace:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is about to rename
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model.generation_config = cast("Any", GenerationConfig)(do_sample=False, eos_token_id=None, pad_token_id=0)
    if not adapters:
        return HuggingFace(model.eval(), adapted=False)
    import peft

    directories = dict(adapters)
    first = next(iter(directories))
    wrapped: Any = peft.PeftModel.from_pretrained(model, directories.pop(first), adapter_name=first)
    for name, directory in directories.items():
        wrapped.load_adapter(directory, adapter_name=name)
    return HuggingFace(wrapped.eval(), adapted=True)


if __name__ == "__main__":
    serve(load)
