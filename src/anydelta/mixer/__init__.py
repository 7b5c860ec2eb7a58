"""The gated delta mixer: what stands between the projections of a linear attention layer, as one operator.

arguments.py has the table, op.py the public functions, spec.py what a valid call is, reference.py the oracle,
torch_ops.py `torch.ops.anydelta.gated_delta_mixer_`.
"""
