"""The backends, one folder each. `host.py` has a `BACKEND` object (see dispatch.Backend), imported on first use."""
