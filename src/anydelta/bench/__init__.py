"""Measures the operator against other implementations and the machine's limits: `anydelta bench`.

commands/     one command per file: its options, and small measurements themselves
contenders/   what is compared: anydelta, ggml, llama.cpp, ExecuTorch, MLX, Transformers
measure/      cases and prompts, how each kind is timed (turns, ops, model, ...), and reports

Results are records. Only the modules *report.py format them.
"""
