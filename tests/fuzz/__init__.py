"""Coverage-guided fuzzing of what reads strangers' bytes: `python -m tests.fuzz.checkpoint -max_total_time=60`.

Targets take bytes and may raise what the server answers with, nothing else. `test_fuzz.py` runs each for a while.
"""
