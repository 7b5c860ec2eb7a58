"""Text from a prompt, streamed: `anydelta generate`.

checkpoint.py opens a model or says in one sentence why not, write.py runs it and times it, cli.py is the command.
"""
