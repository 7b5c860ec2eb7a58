"""Measuring the operator against other implementations and against the machine's own limits.

cases.py says what is measured, peers.py and ggml.py by whom, ops.py measures, report.py prints and plots,
cli.py is `anydelta bench`. Results are records; nothing but report.py formats them.
"""
