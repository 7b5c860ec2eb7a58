"""The peers' functions on anydelta's operator: their names, argument order, layouts and conventions, exactly.

- fla: flash-linear-attention's chunk_gated_delta_rule, fused_recurrent_kda and their siblings
- ggml: gated_delta_net, as GGML_OP_GATED_DELTA_NET
- executorch: gated_delta_rule as in metal:: and mlx::, llama_gated_delta_rule as in llama::

Every argument that is accepted has an effect or is checked; what cannot be honoured raises UnsupportedError.
The faces take no backend argument, as the peers have none: ANYDELTA_BACKEND forces one.
"""
