"""The gated delta mixer: what stands between the projections of a linear attention layer, as one operator.

op.py has the public functions, spec.py what a valid call is, reference.py the oracle, composed.py the operator out of
torch's own and the rule, cpu.py the host of the native kernel, torch_op.py `torch.ops.anydelta.gated_delta_mixer_`.
"""
