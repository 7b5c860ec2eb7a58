"""Commit and rollback: `StatePool` (pool.py), its two forms (slots.py, log.py), checkpoints (snapshots.py)."""

from .checkpoints import Snapshot, Snapshots
from .pool import FORMS, KEY_DTYPES, StatePool

__all__ = ["FORMS", "KEY_DTYPES", "Snapshot", "Snapshots", "StatePool"]
