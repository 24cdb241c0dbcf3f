"""`python -m server.model.native [LEVEL ...]`: prebuild the kernels into the package, for images that ship no compiler.

Levels are the compiler's names for processor generations (x86-64-v3, x86-64-v4); prints the libraries it wrote.
"""

from __future__ import annotations

import sys

from .build import LEVELS, prebuild

if __name__ == "__main__":
    for path in prebuild(sys.argv[1:] or list(LEVELS)):
        print(path)
