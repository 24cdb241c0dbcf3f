"""METHODS: every PEFT family that is served, by name. A new family is one file here and one line below.

`METHODS` reads uploads; an engine with native kernels builds its own table with `build_methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .base import Method
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .ia3 import IA3
from .lora import Kernel, Lora
from .prefix_tuning import PrefixTuning
from .prompt_tuning import PromptTuning, PTuning


def build_methods(kernel: Kernel | None = None) -> Mapping[str, Method]:
    """The families, with LoRA's arithmetic done by `kernel` where one is given."""
    families: tuple[Method, ...] = (
        Lora(kernel),
        IA3(),
        BitFit(),
        Bottleneck(),
        PrefixTuning(),
        PromptTuning(),
        PTuning(),
    )
    return MappingProxyType({family.name: family for family in families})


METHODS: Mapping[str, Method] = build_methods()
