"""What the Triton kernels multiply in: the activations' own dtype, summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_dtype(dtype: torch.dtype) -> Any:
    """Triton's dtype of a product's inputs. Triton's interpreter cannot multiply bf16, so there it is fp32."""
    return tl.float32 if triton.knobs.runtime.interpret else _HALF.get(dtype, tl.float32)
