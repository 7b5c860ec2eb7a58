"""Measuring the operator against other implementations and against the machine's own limits: `anydelta bench`.

commands/     one command a file: its options, and what is small enough to be measured there
contenders/   who is measured: anydelta, ggml, llama.cpp, ExecuTorch, MLX, Transformers
measure/      what is measured (cases, prompts), how (turns, ops, model, ...), and reports

Results are records; nothing but the modules *report.py formats them.
"""
