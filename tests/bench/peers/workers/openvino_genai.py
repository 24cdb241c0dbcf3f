"""OpenVINO GenAI's continuous batching, fp32, prefix caching off. It cannot mix adapters in a batch: the base alone.

The base is converted once with optimum-intel, beside this venv, under a name that holds the checkpoint's own digest.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .lines import Names, Rows, serve, stopwatch

_CACHE_GB = 2


class OpenVino:
    """One pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._genai = import_module("openvino_genai")
        self.version = f"openvino_genai {self._genai.__version__}"

    def generate(self, prompts: Rows, texts: list[str], adapters: Names, new: int) -> tuple[float, Rows]:
        if any(adapters):
            raise ValueError("OpenVINO GenAI does not batch different adapters")
        tensors = [self._tensor(prompt) for prompt in prompts]
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos = new, new, True
        config.do_sample, config.apply_chat_template = False, False
        with stopwatch() as seconds:
            outputs = self._pipeline.generate(tensors, [config] * len(prompts))
        return seconds(), [list(output.m_generation_ids[0]) for output in outputs]

    def _tensor(self, prompt: list[int]) -> Any:
        return import_module("openvino").Tensor(import_module("numpy").array([prompt], dtype="int64"))


def load(base: str, adapters: dict[str, str], rows: int, tokens: int, threads: int) -> OpenVino:
    genai = import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching, scheduler.max_num_seqs = _CACHE_GB, False, rows
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return OpenVino(genai.ContinuousBatchingPipeline(str(converted(Path(base))), scheduler, "CPU", properties))


def converted(base: Path) -> Path:
    """The base in OpenVINO's own form; minutes at first, nothing afterwards."""
    with (base / "config.json").open("rb") as config, (base / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest() + hashlib.sha256(config.read()).hexdigest()
    target = Path(sys.prefix) / "converted" / hashlib.sha256(digest.encode()).hexdigest()[:16]
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        tool = Path(sys.prefix) / "bin" / "optimum-cli"
        options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        subprocess.run([str(tool), "export", "openvino", "-m", str(base), *options, str(unfinished)], check=True, stdout=2)
        unfinished.rename(target)
    return target


if __name__ == "__main__":
    serve(load)
