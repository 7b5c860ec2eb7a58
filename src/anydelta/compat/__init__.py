"""Functions of other projects on anydelta's operator, with exactly their names, argument order, layouts and
conventions.

- fla: flash-linear-attention's chunk_gated_delta_rule, fused_recurrent_kda and their siblings
- ggml: gated_delta_net, as GGML_OP_GATED_DELTA_NET
- executorch: gated_delta_rule as in metal:: and mlx::, llama_gated_delta_rule as in llama::

Every accepted argument has an effect or is checked; unsupported ones raise UnsupportedError. There is no backend
argument, as in the originals: ANYDELTA_BACKEND forces one.
"""
