"""Commit and rollback: `StatePool` (pool.py), its two forms (slots.py, token_log.py), checkpoints (checkpoints.py)."""

from .checkpoints import Checkpoint, Checkpoints
from .pool import FORMS, KEY_DTYPES, StatePool

__all__ = ["FORMS", "KEY_DTYPES", "Checkpoint", "Checkpoints", "StatePool"]
