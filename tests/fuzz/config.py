"""Fuzzes the config parser: adapter_config.json of every dialect with fields added, changed and missing, or any bytes at all.

python -m tests.fuzz.config -max_total_time=60
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import atheris

with atheris.instrument_imports(include=["server.checkpoints", "server.methods"]):
    from server.checkpoints import peft_fields
    from server.methods.read import describe, read_parts

from server.errors import AdapterError
from tests.fuzz.harness import fuzz, json_value, pick
from tests.fuzz.uploads import CONFIGS, LIMITS, SEEDS, SHAPE, WEIGHTS, paths_of

#: What values are made of: words that some field takes, and the weapons of every field that takes a pattern.
WORDS = [
    *("q_proj", "all-linear", "model.layers.0.self_attn.q_proj", "SEQ_CLS", "CAUSAL_LM", "all", "none", "lora_only", "{input}"),
    *(r".*\.q_proj", "(.|..)+!", "[[:a:]]", "(?=x)", "a{1000}{1000}", "../../etc/passwd", "\x00", "😀"),
]
FIELDS = sorted(
    {name for kind in vars(peft_fields).values() if hasattr(kind, "model_fields") for name in kind.model_fields}
    | {"peft_type", "config", "adapter_config", "id2label", "megatron_config", "auto_mapping", "template", "verbalizer", "name"}
)
KINDS = [
    "LORA",
    "ADALORA",
    "VERA",
    "IA3",
    "BITFIT",
    "BEFT",
    "LN_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "CPT",
    "HEAD",
]


def target(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    index = source.ConsumeIntInRange(0, len(SEEDS) - 1)
    config = changed(source, CONFIGS[index]) if source.ConsumeBool() else source.ConsumeBytes(len(data))
    with contextlib.suppress(AdapterError):
        describe(read_parts(paths_of({"adapter_config.json": config, WEIGHTS: SEEDS[index][WEIGHTS]}), SHAPE, LIMITS))


def changed(source: atheris.FuzzedDataProvider, config: bytes) -> bytes:
    fields = json.loads(config)
    for _ in range(source.ConsumeIntInRange(1, 4)):
        name = pick(source, FIELDS)
        if source.ConsumeIntInRange(0, 5) == 0:
            fields.pop(name, None)
        else:
            fields[name] = pick(source, KINDS) if name == "peft_type" else json_value(source, WORDS)
    return json.dumps(fields).encode()


def seeds() -> Iterator[bytes]:
    yield from CONFIGS
    yield bytes(range(256))


if __name__ == "__main__":
    fuzz(target, seeds())
