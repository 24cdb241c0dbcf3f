"""Opcodes: the numbers that a layer's program is written in. Means nothing without program.h, which has the same ones."""

from __future__ import annotations

#: Instructions of a layer, in the order of `Kind` in program.h.
NORM, LINEAR, LORA, WRITE, ATTEND, ADD, SILU_MUL, GELU_TANH_MUL, ADD_ROWS, MUL_ROWS, BOTTLENECK = range(11)
INSTRUCTION_WORDS, FRAME_WORDS = 16, 12
