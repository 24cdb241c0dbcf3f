"""One script per peer, run by its own venv's python: JSON lines on stdin and stdout (see lines.py).

Apart from `ours` and `served` they import nothing of this project, for it is not installed there.
"""
