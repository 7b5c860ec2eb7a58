"""What a backend takes, as data, and the reasons against a call that follow from it.

`Accepts` names the arrays of a call, its options and the facts of its spec, each with the values that are taken. A call
is refused if it has an array or a non-default option that is not named. So every backend refuses a new argument until
it names it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Rule = Callable[[Any], str]
"""A function of a spec that returns the reason against it, or "". For checks that no list of values can express."""


class Options(Protocol):
    """The fields of a call's options (a NamedTuple) that are read here."""

    def _asdict(self) -> dict[str, Any]: ...

    @property
    def op(self) -> str: ...

    @property
    def decay(self) -> str: ...


class Asked(Protocol):
    """The fields of a valid call that `reasons` always reads. Rows name more of them."""

    @property
    def given(self) -> tuple[str, ...]:
        """The arrays of the table that the call has."""
        ...

    @property
    def options(self) -> Options: ...

    @property
    def device(self) -> str:
        """A key of dispatch.PRIORITY."""
        ...


class _Any:
    def __contains__(self, value: object) -> bool:
        return True


ANY = _Any()
"""Every value that the table of arguments allows."""


@dataclass(frozen=True)
class UpTo:
    """Numbers up to a largest one."""

    most: int

    def __contains__(self, value: Any) -> bool:
        return bool(value <= self.most)

    def __str__(self) -> str:
        return f"up to {self.most}"


@dataclass(frozen=True)
class Row:
    """The values of one field that are taken."""

    allowed: Container[object]
    said: str = ""
    """A reason that replaces the usual one: a format over `allowed`, `got`, `where` and `spec`."""


_SAID = {
    "dtype": "takes {allowed}; got {got}",
    "state_dtype": "takes states in {allowed}; got {got}",
    "g_dtype": "takes g in {allowed}; got {got}",
    "beta_dtype": "takes beta in {allowed}; got {got}",
    "framework": "takes {allowed} arrays; got {got} arrays",
    "device": "takes tensors on {allowed}; got device {where}",
}
"""The usual reasons for fields whose name is not the word for them."""


@dataclass(frozen=True)
class Accepts:
    """What a backend takes of valid calls.

    Attributes:
        arrays: the arrays of the call's table that it reads or writes.
        rows: the values that it takes, by the name of an option or of a field of the spec.
        rules: checks that no list of values can express, such as sizes that depend on each other.
        limits: rules about the machine, for instance a driver's limits. They are asked last, only of an available
            backend, and only if nothing else is against the call.
    """

    arrays: frozenset[str] = frozenset()
    rows: Mapping[str, Row] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    limits: tuple[Rule, ...] = ()

    def but(
        self,
        *,
        arrays: tuple[str, ...] = (),
        rules: tuple[Rule, ...] = (),
        limits: tuple[Rule, ...] | None = None,
        **rows: Container[object] | Row,
    ) -> Accepts:
        """A copy with these rows added or replaced, and with more arrays and rules."""
        return replace(
            self,
            arrays=self.arrays | set(arrays),
            rows={**self.rows, **{n: row if isinstance(row, Row) else Row(row) for n, row in rows.items()}},
            rules=(*self.rules, *rules),
            limits=self.limits if limits is None else limits,
        )


def reasons(accepts: Accepts, spec: Asked, *, here: bool = True) -> tuple[str, ...]:
    """All reasons against a call, each a sentence `takes X; got Y`. `here`: check this machine's limits too."""
    no = [f"takes no {name}; got one" for name in spec.given if name not in accepts.arrays]
    options = spec.options._asdict()
    for name, row in accepts.rows.items():
        got = options[name] if name in options else _fact(spec, name)
        if got not in row.allowed:
            no.append(_words(name, row, got, spec))
    for name, default in getattr(spec.options, "_field_defaults").items():  # noqa: B009  a NamedTuple's
        if name != "op" and name not in accepts.rows and options[name] != default:
            no.append(f"takes {name}={default!r} only; got {options[name]!r}")
    no += filter(None, (rule(spec) for rule in accepts.rules))
    if here and not no:
        no += filter(None, (limit(spec) for limit in accepts.limits))
    return tuple(no)


def _fact(spec: Asked, name: str) -> object:
    """A field of a spec, or of the rule inside it."""
    return getattr(spec if hasattr(spec, name) else getattr(spec, "rule"), name)  # noqa: B009  what a mixer's has


def _words(name: str, row: Row, got: object, spec: Asked) -> str:
    allowed: object = row.allowed
    if isinstance(allowed, tuple):
        *most, last = map(str, allowed or ("none",))
        allowed = f"{', '.join(most)} and {last}" if most else last
    form = row.said or _SAID.get(name, "takes {name} {allowed}; got {got}")
    where = _fact(spec, "resident") or spec.device
    return form.format(name=name, allowed=allowed, got=got, where=where, spec=spec)
