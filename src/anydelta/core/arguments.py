"""The rows of a table of arguments, and what is generated from a table.

rule/arguments.py and mixer/arguments.py are the tables: two classes each, whose fields are annotated with the rows
below. Everything else follows from them: options and keys of plans, checks of numbers and choices, the schemas of
torch.ops, the order in which C++ reads arrays. Only the standard library is used, because the build reads the tables
too (scripts/generate_arguments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from .arrays import Arrays

FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class ArrayRow:
    """An array of a call."""

    shape: str
    """Its legend, as in errors and docstrings."""
    kind: str = "token"
    """What it holds. This decides its dtypes: "token": dtype of q; "gate", "weight": any float; "state"; "flag": bool;
    "index"."""
    optional: bool = False
    explicit: bool = False
    """Optional, but its place in schemas is among the required ones: callers pass None to leave it out."""
    result: bool = False
    """Made by the call: a result, not an argument."""
    written: bool = False
    """Written by each call that has it."""
    public: tuple[str, str] = ("", "")
    """Its argument names in the functional and the in-place operator, where they differ from the field's name."""


@dataclass(frozen=True)
class NumberRow:
    """A number, finite in float32."""

    minimum: float = -FLOAT32_MAX
    maximum: float = FLOAT32_MAX
    why: str = ""
    """Text after the maximum in the error."""


@dataclass(frozen=True)
class ChoiceRow:
    """One of a few words. None is allowed if it is among them."""

    values: tuple[str | None, ...]


@dataclass(frozen=True)
class FlagRow:
    """True or False."""


Row = ArrayRow | NumberRow | ChoiceRow | FlagRow


@dataclass(frozen=True)
class Field:
    """A field of a table: its name, its Python type without None, whether None may be given, and its row."""

    name: str
    type: type
    optional: bool
    row: Row


@cache
def fields(table: Hashable) -> Mapping[str, Field]:
    """The rows of a table by name, in its order. Fields without a row are not arguments."""
    found: dict[str, Field] = {}
    for name, hint in get_type_hints(table, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        inner, row = get_args(hint)[:2]
        kinds = [t for t in get_args(inner) or (inner,) if t is not type(None)]
        optional = row.optional if isinstance(row, ArrayRow) else type(None) in get_args(inner)
        found[name] = Field(name, kinds[0], optional, row)
    return found


def arrays(table: Hashable, *kinds: str) -> tuple[str, ...]:
    """The arguments of a table that are arrays of these kinds, or of any, in its order."""
    rows = {name: field.row for name, field in fields(table).items()}
    return tuple(
        name
        for name, row in rows.items()
        if isinstance(row, ArrayRow) and not row.result and (not kinds or row.kind in kinds)
    )


def plain(table: Hashable, names: Iterable[str]) -> tuple[str, ...]:
    """The options among `names` that are a flag, or a number that is never None."""
    rows = {name: fields(table)[name] for name in names}
    return tuple(n for n, f in rows.items() if isinstance(f.row, FlagRow | NumberRow) and not f.optional)


def reader(names: Iterable[str]) -> Callable[[object], Arrays]:
    """A function that returns these fields of a call. Compiled from the names: half the time of an attrgetter."""
    found: Callable[[object], Arrays] = eval(f"lambda c: ({' '.join(f'c.{n},' for n in names)})")
    return found


def in_order(table: type) -> Callable[[object], Arrays]:
    """A function that returns all arrays of a call, in the order of the table, which the extension shares."""
    return reader(table.__dataclass_fields__)  # type: ignore[attr-defined]


def given(call: Any) -> tuple[str, ...]:
    """The arrays that a call has, without those that it makes."""
    table: type = type(call)
    rows = fields(table)
    made = {n for n, f in rows.items() if isinstance(f.row, ArrayRow) and f.row.result}
    return tuple(n for n in call.__dataclass_fields__ if n not in made and getattr(call, n) is not None)


def problem(field: Field, value: object) -> Exception | None:
    """What is wrong with the value of an option: a TypeError or ValueError to be raised, or None."""
    row, name = field.row, field.name
    if isinstance(row, ChoiceRow):
        if value not in row.values or not isinstance(value, (str, type(None))):
            words = list(map(repr, row.values))
            known = " or ".join(words) if None in row.values else f"one of {', '.join(words)}"
            return ValueError(f"{name} must be {known}; got {value!r}")
    elif isinstance(row, FlagRow):
        if not isinstance(value, bool):
            return TypeError(f"{name} must be True or False; got {value!r}")
    elif isinstance(row, NumberRow) and not (value is None and field.optional):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return TypeError(f"{name} must be a number; got {type(value).__name__}")
        if not abs(value) <= FLOAT32_MAX:  # NaN too; an int may be too large for float()
            got = value if isinstance(value, float) else "a larger integer"
            return ValueError(f"{name} must be finite in float32; got {got}")
        if value < row.minimum:
            return ValueError(f"{name} must be >= {row.minimum:g}; got {float(value)}")
        if value > row.maximum:
            return ValueError(f"{name} must be <= {row.maximum:g}{row.why}; got {float(value)}")
    return None


def options_of(options: NamedTuple, *without: str) -> dict[str, Any]:
    """The options of a call by name, as keyword arguments for a function."""
    return {name: getattr(options, name) for name in fields(type(options)) if name not in without}


@dataclass(frozen=True)
class Operator:
    """An operator of torch.ops.anydelta over a table of arrays and one of options."""

    name: str
    public_name: str
    """The name of the public function, as in errors."""
    arrays: type
    options: type
    returns: str
    inplace: bool
    required: tuple[str, ...] = ()
    """Arrays that are optional in the table and required here. They come after the table's required ones."""
    without: tuple[str, ...] = ()
    """Arrays and options that it does not take."""
    lists: tuple[str, ...] = ()
    """Arrays that come as a list of tensors."""
    reads: tuple[str, ...] = ()
    """Arrays that other operators of the table write, and this one does not."""

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The fields of the arrays it takes, in the order of its schema: first those without a default."""
        taken = [n for n in arrays(self.arrays) if n not in self.without]
        needed = [n for n in taken if not self._default(n)]
        return (*needed, *(n for n in taken if self._default(n)))

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """The options it takes, in the order of the table."""
        return tuple(n for n in fields(self.options) if n not in self.without)

    @cached_property
    def bind(self) -> Callable[..., tuple[Arrays, tuple[Any, ...]]]:
        """A function that takes the operator's arguments, without those at their defaults, and returns all arrays and
        all options in the order of their tables, the backend last. Compiled as `reader`."""
        defaults = getattr(self.options, "_field_defaults")  # noqa: B009  a NamedTuple's
        taken = [self.public(n) + ("=None" if self._default(n) else "") for n in self.tensors]
        flags = [f"{n}={defaults[n]!r}" for n in self.flags]
        arrays = [self.public(n) if n in self.tensors else "None" for n in self.arguments]
        options = [n if n in self.flags else repr(defaults[n]) for n in defaults if n != "op"]
        found: Callable[..., tuple[Arrays, tuple[object, ...]]] = eval(
            f"lambda {', '.join([*taken, '*', *flags])}, backend='auto': "
            f"(({', '.join(arrays)}), ({self.public_name!r}, {', '.join(options)}, backend))"
        )
        return found

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """All fields of the table that are not made by the call, in its order."""
        rows = self.arrays.__dataclass_fields__  # type: ignore[attr-defined]
        made = {n for n, f in fields(self.arrays).items() if isinstance(f.row, ArrayRow) and f.row.result}
        return tuple(n for n in rows if n not in made)

    def public(self, name: str) -> str:
        """The argument name of an array."""
        return self.row(name).public[self.inplace] or name

    def row(self, name: str) -> ArrayRow:
        """The row of an array."""
        row = fields(self.arrays)[name].row
        assert isinstance(row, ArrayRow)
        return row

    def optional(self, name: str) -> bool:
        """Whether an array may be None."""
        return self.row(name).optional and name not in self.required

    def _default(self, name: str) -> bool:
        return self.optional(name) and not self.row(name).explicit

    def schema(self) -> str:
        """The schema in torch.library's syntax."""
        texts, letters = [], iter("abcdefgh")
        for name in self.tensors:
            row = self.row(name)
            kind = "Tensor[]" if name in self.lists else "Tensor"
            if (row.written and name not in self.reads) or (self.inplace and row.public[1]):
                kind += f"({next(letters)}!)"
            mark = "?" if self.optional(name) else ""
            texts.append(f"{kind}{mark} {self.public(name)}" + ("=None" if self._default(name) else ""))
        texts.append("*")
        for name in self.flags:
            f = fields(self.options)[name]
            default = getattr(self.options, "_field_defaults")[name]  # noqa: B009  a NamedTuple's
            texts.append(f"{f.type.__name__}{'?' if f.optional else ''} {name}={_literal(default)}")
        texts.append('str backend="auto"')
        return f"{self.name}({', '.join(texts)}) -> {self.returns}"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("e-0", "e-")
