"""The devices that a backend finds, by number and by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ...core.devices import Device
from ...core.dispatch import UnsupportedError

D = TypeVar("D", bound=Device)


class Roster(Generic[D]):
    """The devices of a backend, in the order of their numbers. Each is opened once."""

    def __init__(
        self, kind: str, title: str, labels: Callable[[], Sequence[str]], make: Callable[[str, int], D]
    ):
        self.kind, self.title, self.labels, self._make = kind, title, labels, make
        self.opened: dict[str, D] = {}
        """Opened devices by name."""
        self._lock = threading.Lock()

    def open(self, index: int) -> D:
        """The device of that index; see `anydelta.device`.

        Raises:
            UnsupportedError: there is no such device; the text lists the present ones.
        """
        labels = self.labels()
        if not 0 <= index < len(labels):
            names = "; ".join(f"{self.kind}:{i} {label}" for i, label in enumerate(labels))
            raise UnsupportedError(
                f"device {self.kind}:{index}: there is no such {self.title} device; there are {names}"
            )
        with self._lock:
            name = f"{self.kind}:{index}"
            if name not in self.opened:
                self.opened[name] = self._make(name, index)
            return self.opened[name]

    def default(self) -> D:
        """The device for calls with host arrays: ANYDELTA_<KIND>_DEVICE, or the first one."""
        env = f"ANYDELTA_{self.kind.upper()}_DEVICE"
        wanted = os.environ.get(env, "0")
        if wanted.isdigit():
            return self.open(int(wanted))
        labels = self.labels()
        for index, label in enumerate(labels):
            if wanted.lower() in label.lower():
                return self.open(index)
        names = "; ".join(f"{i} {label}" for i, label in enumerate(labels))
        raise UnsupportedError(f"{env} must be an index or a part of a name of {names}; got {wanted!r}")
