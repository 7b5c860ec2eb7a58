"""The support table of README.md, from what the backends themselves declare (`Backend.supports`).

    python scripts/support_table.py                       print it
    python scripts/support_table.py --write README.md     put it between the marks in that file
    python scripts/support_table.py --check README.md     exit 1 if the file holds an old one

A cell says whether the backend accepts such a call; that it then computes the right thing is what
`anydelta conform` proves. Nothing here depends on the machine: a backend answers without its hardware.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anydelta import dispatch
from anydelta.conformance import Case
from anydelta.spec import Call, CallSpec, Options, check_call

BEGIN = "<!-- support table: written by `make readme` -->"
END = "<!-- end of the support table -->"


@dataclass(frozen=True)
class Feature:
    """One row: how a plain call must change to ask for it, and which conformance cases use it."""

    name: str
    change: Callable[[CallSpec], CallSpec]
    used_by: Callable[[Case], bool]


def _with(spec: CallSpec, **options: object) -> CallSpec:
    return replace(spec, options=replace(spec.options, **options))  # type: ignore[arg-type]


def _float64(spec: CallSpec) -> CallSpec:
    return replace(spec, dtype="float64", state_dtype="float64", g_dtype="float64", beta_dtype="float64")


FEATURES = (
    Feature("GDA: one decay per head", lambda s: s, lambda c: not c.kda),
    Feature("KDA: one decay per key channel", lambda s: replace(s, kda=True), lambda c: c.kda),
    Feature("linear decays", lambda s: _with(s, decay="linear"), lambda c: c.decay == "linear"),
    Feature("raw gates (`A_log`, `dt_bias`)", lambda s: _with(s, decay="raw"), lambda c: c.decay == "raw"),
    Feature("beta as a logit", lambda s: _with(s, beta_is_logit=True), lambda c: c.logit),
    Feature("q/k L2 norm in the kernel", lambda s: _with(s, qk_l2norm=True), lambda c: c.l2norm),
    Feature("tiled heads (GGUF)", lambda s: _with(s, heads="tiled"), lambda c: c.heads == "tiled"),
    Feature("state as [V, K]", lambda s: _with(s, state_layout="vk"), lambda c: c.layout == "vk"),
    Feature("any head size, K != V", lambda s: replace(s, K=7, V=33), lambda c: (c.K, c.V) == (7, 33)),
    Feature("q k v in bfloat16", lambda s: replace(s, dtype="bfloat16"), lambda c: c.dtype == "bfloat16"),
    Feature("q k v in float16", lambda s: replace(s, dtype="float16"), lambda c: c.dtype == "float16"),
    Feature("everything in float64", _float64, lambda c: c.dtype == "float64"),
    Feature("state in bfloat16", lambda s: replace(s, state_dtype="bfloat16"), lambda c: c.state_dtype == "bfloat16"),
    Feature("in place", lambda s: replace(s, inplace=True, has_state=True), lambda c: c.inplace),
    Feature("packed sequences", lambda s: replace(s, packed=True), lambda c: c.seqlens is not None),
    Feature("state pool", lambda s: replace(s, pooled=True, P=8, has_state=True), lambda c: c.indices is not None),
    Feature("mask", lambda s: replace(s, masked=True), lambda c: bool(c.mask)),
    Feature("last-K snapshots", lambda s: replace(s, snapshots=4), lambda c: c.snapshots > 0),
    Feature("NumPy arrays", lambda s: replace(s, framework="numpy"), lambda c: True),
    Feature("torch tensors", lambda s: replace(s, framework="torch"), lambda c: True),
)  # fmt: skip


def plain(backend: str) -> CallSpec:
    """A small call that uses nothing special, on a device and with arrays that the backend is meant for."""
    x, gate = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    spec = check_call(Call(x, x, x, gate, gate), Options(), inplace=False)
    devices = [device for device, names in dispatch.PRIORITY.items() if backend in names]
    on = [replace(spec, device=d, framework=f) for d in devices for f in ("numpy", "torch")]
    return next((s for s in on if not dispatch.get_backend(backend).supports(s)), spec)


def table() -> str:
    """Features down, backends across, as Markdown."""
    rows = [
        "| | " + " | ".join(f"`{name}`" for name in dispatch.NAMES) + " |",
        "|---|" + "---|" * len(dispatch.NAMES),
        "| devices | " + " | ".join(_devices(name) for name in dispatch.NAMES) + " |",
    ]
    specs = {name: plain(name) for name in dispatch.NAMES}
    for feature in FEATURES:
        answers = [dispatch.get_backend(n).supports(feature.change(s)) for n, s in specs.items()]
        cells = ["no: " + "; ".join(map(str, reasons)) if reasons else "yes" for reasons in answers]
        rows.append(f"| {feature.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _devices(backend: str) -> str:
    devices = [device for device, names in dispatch.PRIORITY.items() if backend in names]
    return "any" if backend == "reference" else ", ".join(devices)


def replaced(text: str, path: Path) -> str:
    """The text of a file with the table of today."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"support_table: {path} must hold the lines {BEGIN!r} and {END!r}.")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE")
    args = parser.parse_args()
    path = args.write or args.check
    if path is None:
        print(table())
        return
    old = path.read_text(encoding="utf-8")
    new = replaced(old, path)
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"support_table: the table in {path} is old; run: make readme.")


if __name__ == "__main__":
    main()
