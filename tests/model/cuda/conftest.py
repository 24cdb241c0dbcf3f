"""Triton's interpreter: kernels are decorated when their module is first imported, so this has to be said before."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
