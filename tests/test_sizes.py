"""Calls whose arrays are larger than any memory, as views can be, or empty with large sizes: refused in one
sentence, or done at once. In processes of their own, for what can go wrong here are crashes and endless loops."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

CALLS = '''
import json
import torch, anydelta
from anydelta.rule import torch_ops as torch_op
torch.set_num_threads(1)

def view(*shape, dtype=torch.float32):
    """An array of one number, or of none, that takes no memory."""
    return torch.zeros(1, dtype=dtype).as_strided(shape, (0,) * len(shape))

def rule(B=1, T=1, H=1, HV=1, K=4, V=4, kda=False):
    return dict(q=view(B, T, H, K), k=view(B, T, H, K), v=view(B, T, HV, V), beta=view(B, T, HV),
                g=view(B, T, HV, K) if kda else view(B, T, HV))

def mixer(T, HV, K, V, H=1, P=0, W=4, S=3):
    C = 2 * H * K + HV * V
    return dict(qkv=view(1, T, C), conv_state=view(P, C, S), state=view(P, HV, K, V), g=view(1, T, HV),
                beta=view(1, T, HV), conv_weight=view(C, W), A_log=view(HV),
                state_indices=torch.full((1,), -1))

none = torch.full((1,), -1)
nothing = torch.zeros(1, dtype=torch.int64)                # cu_seqlens of no sequence
CALLS = {
    "a long row": lambda: ("", rule(K=1 << 60)),
    "a wide state": lambda: ("", rule(K=1 << 31, V=1 << 31)),
    "a wide empty state": lambda: (
        "_", rule(K=1 << 31, V=1 << 31) | dict(state=view(0, 1, 1 << 31, 1 << 31), state_indices=none)),
    "KDA's gates": lambda: ("", rule(T=0, HV=1 << 26, K=1 << 26, kda=True)),
    "heads without a token": lambda: ("", rule(T=0, HV=1 << 59) | dict(output_final_state=False)),
    "no sequence": lambda: ("", rule(T=0, HV=1 << 50, V=1) | dict(cu_seqlens=nothing)),
    "a large pool": lambda: ("", rule() | dict(initial_state=view(1 << 50, 1, 4, 4), state_indices=none)),
    "many slots": lambda: ("", rule(B=0) | dict(snapshots=view(1 << 50, 0, 1, 4, 4))),
    "few enough heads": lambda: ("", rule(T=0, HV=1 << 45, V=1, K=1) | dict(output_final_state=False)),
    "few enough sequences": lambda: ("", rule(B=1 << 45, T=0, K=1, V=1) | dict(output_final_state=False)),
    "an empty state": lambda: ("_", rule(HV=2, H=2) | dict(state=view(0, 2, 4, 4), state_indices=none)),
    "mixer: a wide state": lambda: ("mixer", mixer(1, 1, 1 << 31, 1 << 31)),
    "mixer: a wrapped state": lambda: ("mixer", mixer(1, 1, 1 << 40, 1 << 24)),
    "mixer: many heads": lambda: ("mixer", mixer(0, 1 << 47, 1, 2)),
    "mixer: many taps": lambda: ("mixer", mixer(1, 1, 1 << 10, 1 << 10, W=1 << 40, S=1 << 40)),
    "mixer: an empty state": lambda: ("mixer", mixer(1, 2, 4, 4)),
}

def runs_of(kind, arrays):
    """The call in Python and, for the rule, as an operator of torch."""
    if kind == "mixer":
        qkv, states = arrays.pop("qkv"), (arrays.pop("conv_state"), arrays.pop("state"))
        return [lambda: anydelta.gated_delta_mixer_(qkv, *states, **arrays)]
    name = "gated_delta_rule" + ("_snapshots" if "snapshots" in arrays else kind)
    operator = getattr(torch.ops.anydelta, name)
    if kind == "_":
        rest = {n: x for n, x in arrays.items() if n not in ("q", "k", "v", "state")}
        return [lambda: anydelta.gated_delta_rule_(*(arrays[n] for n in ("q", "k", "v", "state")), **rest),
                lambda: operator(**arrays)]
    return [lambda: anydelta.gated_delta_rule(**arrays)[0], lambda: operator(**arrays)[0]]

for name, make in CALLS.items():
    said = []
    for run in runs_of(*make()):
        try:
            said.append(list(run().shape))
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    print(json.dumps([name, said]), flush=True)
'''
LARGE = "must have at most 2^48 numbers (a size of 0 counts as 1); got"
SAID: dict[str, Any] = {
    "a long row": f"gated_delta_rule: q {LARGE} [1, 1, 1, {1 << 60}]",
    "a wide state": f"gated_delta_rule: the state [N, HV, K, V] {LARGE} [1, 1, {1 << 31}, {1 << 31}]",
    "a wide empty state": f"gated_delta_rule_: the state [N, HV, K, V] {LARGE} [1, 1, {1 << 31}, {1 << 31}]",
    "KDA's gates": f"gated_delta_rule: g {LARGE} [1, 0, {1 << 26}, {1 << 26}]",
    "heads without a token": f"gated_delta_rule: v {LARGE} [1, 0, {1 << 59}, 4]",
    "no sequence": f"gated_delta_rule: v {LARGE} [1, 0, {1 << 50}, 1]",
    "a large pool": f"gated_delta_rule: initial_state {LARGE} [{1 << 50}, 1, 4, 4]",
    "many slots": f"gated_delta_rule: snapshots {LARGE} [{1 << 50}, 0, 1, 4, 4]",
    "few enough heads": [1, 0, 1 << 45, 1],
    "few enough sequences": [1 << 45, 0, 1, 1],
    "an empty state": [1, 1, 2, 4],
    "mixer: a wide state": f"gated_delta_mixer_: the state [N, HV, K, V] {LARGE}",
    "mixer: a wrapped state": f"gated_delta_mixer_: the state [N, HV, K, V] {LARGE}",
    "mixer: many heads": f"gated_delta_mixer_: qkv {LARGE}",
    "mixer: many taps": f"gated_delta_mixer_: conv_weight {LARGE}",
    "mixer: an empty state": [1, 1, 8],
}


def test_large_and_empty_arrays() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CALLS], capture_output=True, text=True, timeout=300, check=False
    )
    found = dict(json.loads(line) for line in run.stdout.splitlines())
    missing = [name for name in SAID if name not in found]
    assert not missing, f"nothing came of {missing[0]!r}, exit status {run.returncode}: {run.stderr[-2000:]}"
    for name, want in SAID.items():
        for said in found[name]:
            good = isinstance(said, str) and said.startswith(want) if isinstance(want, str) else said == want
            assert good, f"{name}: {said}, not {want}"


def test_no_memory_is_said_in_a_sentence() -> None:
    """A call whose arrays fit and whose scratch memory does not: in a process that may have no more."""
    code = """
import resource, numpy as np, anydelta
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
x, one = np.zeros((1, 1, 1, 1 << 28), np.float32), np.zeros((1, 1, 1, 1), np.float32)
try:
    anydelta.gated_delta_rule(x, x, one, g=one[0], beta=one[0], output_final_state=False, backend="cpu")
except MemoryError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.startswith("anydelta: requires more memory than the system gives"), (
        run.stdout + run.stderr
    )
