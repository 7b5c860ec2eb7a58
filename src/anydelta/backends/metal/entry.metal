// The entry point for hosts that bind buffers by number: torch.mps.compile_shader. Grid: panels of columns, HV, N.
// (mx.fast.metal_kernel writes the signature itself: mlx_host.py has the body.)
kernel void gated_delta_rule(
    constant Params& P [[buffer(0)]],
    device const uchar* q [[buffer(1)]], device const uchar* k [[buffer(2)]], device const uchar* v [[buffer(3)]],
    device const uchar* g [[buffer(4)]], device const uchar* beta [[buffer(5)]],
    device const uchar* state_in [[buffer(6)]], device const uchar* a_log [[buffer(7)]],
    device const uchar* dt_bias [[buffer(8)]], device const uchar* mask [[buffer(9)]],
    device const uchar* cu [[buffer(10)]], device const uchar* indices [[buffer(11)]],
    device const uchar* rows [[buffer(12)]], device uchar* o [[buffer(13)]],
    device uchar* state_out [[buffer(14)]], device uchar* snapshots [[buffer(15)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
    threadgroup Scratch scratch;
    const Arrays a = {q,    k,  v,       g,    beta, state_in,  a_log,    dt_bias,
                      mask, cu, indices, rows, o,    state_out, snapshots};
    run<constant Params&>(P, a, scratch, group, simdgroup, lane);
}
