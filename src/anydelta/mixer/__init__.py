"""The gated delta mixer: one operator for everything between the projections of a linear attention layer.

arguments.py has the table, op.py the public functions, spec.py what a valid call is, reference.py the oracle,
torch_ops.py `torch.ops.anydelta.gated_delta_mixer_`.
"""
