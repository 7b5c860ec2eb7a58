"""Text from a prompt, streamed: `anydelta generate`.

checkpoint.py opens a model or says in one sentence why it cannot. write.py runs and times it. cli.py is the command.
"""
