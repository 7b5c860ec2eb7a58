"""The gated delta rule (Gated DeltaNet, Kimi Delta Attention) as one operator for every device.

    o, state = anydelta.gated_delta_rule(q, k, v, g=g, beta=beta)
    o = anydelta.gated_delta_rule_(q, k, v, state, g=g, beta=beta)      # advances state in place

    o = anydelta.gated_delta_mixer_(qkv, conv_state, state, g=a, beta=b, ...)   # with convolution, gates and norm

    state, P = anydelta.gated_delta_transition(k, v, g=g, beta=beta)    # what these tokens make of any state

    pool = anydelta.StatePool(8, HV=32, K=128, V=128, snapshots=5)      # commit and rollback, for many sequences

Torch tensors and NumPy arrays both work. `explain(...)` and `explain_mixer(...)` say which backend runs a call and why.
"""

import sys as _sys

from .core.devices import Device, DeviceArray, DeviceError, device
from .core.dispatch import UnsupportedError
from .mixer.op import explain_mixer, gated_delta_mixer, gated_delta_mixer_
from .mixer.transition import gated_delta_mixer_transition
from .rule.op import explain, gated_delta_rule, gated_delta_rule_
from .rule.transition import gated_delta_transition
from .state import Checkpoint, Checkpoints, StatePool

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Device",
    "DeviceArray",
    "DeviceError",
    "StatePool",
    "UnsupportedError",
    "__version__",
    "device",
    "explain",
    "explain_mixer",
    "gated_delta_mixer",
    "gated_delta_mixer_",
    "gated_delta_mixer_transition",
    "gated_delta_rule",
    "gated_delta_rule_",
    "gated_delta_transition",
]

if "torch" in _sys.modules:  # register torch.ops.anydelta.*; without torch loaded, the first torch call does
    from .mixer import torch_ops as _mixer_torch_op  # noqa: F401
    from .rule import torch_ops as _torch_op  # noqa: F401
