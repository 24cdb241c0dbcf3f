"""That Triton compiles the kernels for real GPUs, to machine code, which needs none: in a process without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")

PROGRAM = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from server.model.cuda import lora, paged

DTYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}

def compiled(kernel, pointers, numbers, constants, **options):
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in kernel.arg_names}
    found = triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", int(sys.argv[1]), 32), options)
    assert found.asm["cubin"]
    print(kernel.__name__, found.metadata.shared)

places = dict.fromkeys(["index", "first", "last", "slot"], "*i64")
for name, dtype in DTYPES.items():
    tiles = dict(rank=16, block_t=16, block_r=16, dtype=dtype)
    sizes = dict.fromkeys(["slots", "features", "x_row", "x_col", "a_slot", "a_rank"], "i32")
    compiled(lora._shrink, {"x": "*" + name, "a": "*bf16", "low": "*fp32", **places}, sizes, {**tiles, "block_k": 128})
    sizes = dict.fromkeys(["slots", "features", "y_row", "y_col", "b_slot", "b_rank"], "i32")
    compiled(lora._expand, {"low": "*fp32", "b": "*bf16", "y": "*" + name, **places}, sizes, {**tiles, "block_n": 128})

tensors = {**dict.fromkeys(["q", "keys", "values", "out"], "*bf16"), **dict.fromkeys(["tables", "starts", "contexts"], "*i32")}
numbers = {"scale": "fp32", "softcap": "fp32"}
strides = ["q_token", "q_head", "q_dim", "out_token", "out_head", "position_stride", "table_row"]
for window, capped in ((0, False), (128, True)):
    blocks = paged._blocks(1, 3, 64, 2)
    compiled(
        paged._attend, tensors, {**numbers, **dict.fromkeys(strides, "i32")},
        dict(size=16, group=3, dim=64, window=window, capped=capped, block_q=blocks.queries, block_m=blocks.rows,
             block_n=blocks.keys, block_d=64, dtype=tl.bfloat16), num_stages=2,
    )
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_becomes_machine_code(capability: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, _ in lines] == ["_shrink", "_expand"] * 2 + ["_attend"] * 2
    assert all(int(shared) <= 48 << 10 for _, shared in lines)  # bytes that any GPU gives a program unasked
