"""The demo: six users, each bound to a small adapter of another family, and two classifiers, made for SmolLM2-135M-Instruct.

Owns the list and the files beside it (fp32 safetensors, exactly as PEFT and AdapterHub save them). Trained by
tests/training; loaded by `adapterd serve --demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class DemoAdapter:
    """One adapter of the demo and the user it is bound to. `directory` holds its config and safetensors."""

    name: str
    user_id: str | None  # None: uploaded, but bound to nobody
    method: str
    what: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods of its parts."""
        return tuple(self.method.split("+"))

    @property
    def directory(self) -> Path:
        return Path(__file__).parent / self.name


DEMO: tuple[DemoAdapter, ...] = (
    DemoAdapter("pirate-lora", "ann", "lora", "talks like a pirate"),
    DemoAdapter("json-prefix", "bob", "prefix_tuning", "answers with a JSON object"),
    DemoAdapter("helpdesk-bottleneck", "cleo", "bottleneck", "answers like a help desk and closes the ticket"),
    DemoAdapter("excited-ia3", "dan", "ia3", "is excited about everything"),
    DemoAdapter("bullets-bitfit", "eve", "bitfit", "answers in three bullet points"),
    DemoAdapter("terse-prompt", "fay", "prompt_tuning", "answers in a word or two"),
    DemoAdapter("letter-ptuning", None, "p_tuning", "answers with a short letter"),
    DemoAdapter("sentiment-head", None, "head+discrete_prompt", "tells positive reviews from negative ones, on /classify"),
    DemoAdapter("sentiment-prompt", None, "discrete_prompt", "the same, by which word the base would go on with"),
)
