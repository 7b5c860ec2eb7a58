"""Commit and rollback: `StatePool` (pool.py), its two forms (slots.py, log.py), checkpoints (snapshots.py)."""

from .pool import FORMS, KEY_DTYPES, StatePool
from .snapshots import Snapshot, Snapshots

__all__ = ["FORMS", "KEY_DTYPES", "Snapshot", "Snapshots", "StatePool"]
