"""Thin hosts, one file per backend, each with a `BACKEND` object (see dispatch.Backend). Imported on first use."""
