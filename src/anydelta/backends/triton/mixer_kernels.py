"""The mixer around the rule: the convolution before it with its states, and the gated norm after it.

    y_t   = silu(sum_j w[c, j] x_(t - W + 1 + j) + bias[c])      x: the inputs of a sequence, before them its conv state
                                                                 [C, S], whose last column is the newest
    out_t = o_t / sqrt(mean(o_t^2) + eps) * weight * gate(z_t)   mean over V; gate: silu or sigmoid

At decode `recurrent` computes the norm, so a step is two launches: `convolve`, which also advances the conv state, and
`recurrent`. Everything between the inputs and the output is float32.

Masked tokens are skipped. With a mask, rank [B, T] is the number of live tokens of a sequence up to t, minus one, and
order [B, T] holds the positions of its live tokens, from its first token on.
"""

import triton
import triton.language as tl

from .chunk_parts import chunk_at
from .common import LARGE, SMALL, gate_of, inverse_length, narrow, squares, tokens_of, widen


@triton.jit
def _position(order, b, T, start, r, inside):
    """The position of live token r of a sequence in its row of the batch."""
    if order is not None:
        at = tl.load(order + b * T + start + r, mask=inside, other=0)
    else:
        at = start + r
    return at.to(tl.int64)


@triton.jit
def _tile(
    x, x_t, at_x, y, conv_state, weight, bias, rank, order, b, T, start, t, end, at_state, c_s, w_w, i_c, in_c,
    at_weight, C: tl.constexpr, W: tl.constexpr, S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y for tokens t [BT] and channels i_c [BC] of one sequence."""
    inside = t < end
    if rank is not None:
        r = tl.load(rank + b * T + t, mask=inside, other=-1)
        before = tl.load(rank + b * T + t - 1, mask=inside & (t > start), other=-1)
        inside = inside & (r > before)  # else the token is masked
    else:
        r = t - start
    out = tl.zeros([t.shape[0], i_c.shape[0]], tl.float32)
    if bias is not None:
        out += widen(tl.load(bias + i_c, mask=in_c, other=0.0))[None, :]
    for d in tl.static_range(W):
        tap = widen(tl.load(weight + at_weight + (W - 1 - d) * w_w, mask=in_c, other=0.0))
        source = r - d
        new = inside & (source >= 0)
        at = _position(order, b, T, start, source, new)
        value = widen(
            tl.load(x + at[:, None] * x_t + at_x[None, :], mask=new[:, None] & in_c[None, :], other=0.0)
        )
        if d > 0:
            old = (inside & (source < 0))[:, None] & in_c[None, :]
            column = (S + source)[:, None] * c_s + at_state[None, :]
            value += widen(tl.load(conv_state + column, mask=old, other=0.0))
        out += value * tap[None, :]
    if SILU:
        out *= 1.0 / (1.0 + tl.exp(-out))
    at_y = (b * T + t.to(tl.int64))[:, None] * C + i_c[None, :]
    tl.store(y + at_y, out, mask=inside[:, None] & in_c[None, :])


@triton.jit
def _window(
    x,
    x_t,
    at_x,
    conv_state,
    order,
    b,
    T,
    start,
    count,
    at_state,
    c_s,
    in_c,
    S: tl.constexpr,
    BS: tl.constexpr,
):
    """The last S inputs [BC, BS] when a sequence has seen `count` live tokens."""
    i_s = tl.arange(0, BS)
    index = count + i_s  # among the S old columns, then the tokens
    in_s = i_s < S
    old = in_s & (index < S)
    new = in_s & (index >= S)
    inside = in_c[:, None] & old[None, :]
    value = widen(tl.load(conv_state + at_state[:, None] + index[None, :] * c_s, mask=inside, other=0.0))
    at = _position(order, b, T, start, index - S, new)
    inside = in_c[:, None] & new[None, :]
    value += widen(tl.load(x + at_x[:, None] + at[None, :] * x_t, mask=inside, other=0.0))
    return value


@triton.jit
def _count(rank, b, T, start, end, back):
    """How many live tokens there are before token end - back."""
    last = end - back - 1
    if rank is not None:
        count = tl.load(rank + b * T + last, mask=last >= start, other=-1) + 1
    else:
        count = last + 1 - start
    return count


@triton.jit(do_not_specialize=["N", "T", "Ks"])
def convolve(
    q, k, v,                          # [B, T, groups, channels of a group] each
    y,                                # [B, T, C] float32, written for live tokens; None: only the states
    conv_state, conv_snapshots,       # [N or P, C, S]; [Ks, N, C, S] or None
    weight, bias,                     # [C, W]; [C] or None
    rank, order, cu_seqlens, state_indices,
    snapshot_indices,                 # [Ks, N] rows of conv_state or -1, instead of conv_snapshots; may be None
    arrivals,                         # [N, HV] int32, set to 0 for `recurrent`; may be None
    N, T, Ks,
    q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_g,
    c_n, c_c, c_s, n_s, n_n, n_c, n_w,  # strides of conv_state and conv_snapshots
    w_c, w_w,
    HV: tl.constexpr, BH: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,  # channels of q (as of k); v
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr,
    W: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SILU: tl.constexpr,
    WALK: tl.constexpr,
):  # fmt: skip
    """Grid: column blocks * sequences (WALK: all tokens of a sequence, and its conv states) or * slots of BT tokens."""
    KEY_BLOCKS: tl.constexpr = (KEYS + BC - 1) // BC
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (VALUES + BC - 1) // BC
    C: tl.constexpr = 2 * KEYS + VALUES
    pid = tl.program_id(0)
    block = pid % BLOCKS
    if WALK:
        n = pid // BLOCKS
        b, start, end = tokens_of(n, cu_seqlens, T)
        first = start
    else:
        n, b, first, end = chunk_at(pid // BLOCKS, cu_seqlens, N, T, 0, BT, False)
        _, start, _ = tokens_of(n, cu_seqlens, T)
        if first >= end:
            return
    row = n.to(tl.int64)
    if state_indices is not None:
        row = tl.load(state_indices + n).to(tl.int64)
        if row < 0:
            return
    if WALK and arrivals is not None:
        if block == 0:
            i_h = tl.arange(0, BH)
            tl.store(arrivals + n * HV + i_h, i_h * 0, mask=i_h < HV)

    is_v = block >= 2 * KEY_BLOCKS
    is_k = (block >= KEY_BLOCKS) & (block < 2 * KEY_BLOCKS)
    x = q
    if is_k:
        x = k
    if is_v:
        x = v
    x_b = tl.where(is_v, v_b, tl.where(is_k, k_b, q_b)).to(tl.int64)
    x_t = tl.where(is_v, v_t, tl.where(is_k, k_t, q_t)).to(tl.int64)
    x_g = tl.where(is_v, v_g, tl.where(is_k, k_g, q_g)).to(tl.int64)
    group = tl.where(is_v, V_GROUP, tl.where(is_k, K_GROUP, Q_GROUP))
    before = tl.where(is_v, 2 * KEY_BLOCKS, tl.where(is_k, KEY_BLOCKS, 0))
    own = (block - before) * BC + tl.arange(0, BC)  # channels within q, k or v
    in_c = own < tl.where(is_v, VALUES, KEYS)
    i_c = own + tl.where(is_v, 2 * KEYS, tl.where(is_k, KEYS, 0))
    x += b * x_b
    at_x = own // group * x_g + own % group
    at_state = row * c_n + i_c.to(tl.int64) * c_c
    at_weight = i_c * w_c
    i_t = tl.arange(0, BT)
    if y is not None:
        if WALK:
            for tile in range(start, end, BT):
                _tile(x, x_t, at_x, y, conv_state, weight, bias, rank, order, b, T, start, tile + i_t, end, at_state,
                      c_s, w_w, i_c, in_c, at_weight, C, W, S, SILU)  # fmt: skip
        else:
            _tile(x, x_t, at_x, y, conv_state, weight, bias, rank, order, b, T, start, first + i_t, end, at_state, c_s,
                  w_w, i_c, in_c, at_weight, C, W, S, SILU)  # fmt: skip
    if WALK and S > 0:
        i_s = tl.arange(0, BS)
        inside = in_c[:, None] & (i_s < S)[None, :]
        count = _count(rank, b, T, start, end, 0)
        final = _window(x, x_t, at_x, conv_state, order, b, T, start, count, at_state, c_s, in_c, S, BS)
        if conv_snapshots is not None:
            # conv_state may be slot 0, so slot 0 is written last
            for slot in range(1, tl.minimum(Ks, end - start)):
                earlier = _count(rank, b, T, start, end, slot)
                value = _window(
                    x, x_t, at_x, conv_state, order, b, T, start, earlier, at_state, c_s, in_c, S, BS
                )
                at = slot * n_s + n.to(tl.int64) * n_n + i_c.to(tl.int64)[:, None] * n_c + i_s[None, :] * n_w
                tl.store(conv_snapshots + at, narrow(value, conv_snapshots.dtype.element_ty), mask=inside)
        own, named = final, row < 0
        if snapshot_indices is not None:
            # The row that is read may be any slot's, so it is written last.
            for slot in range(0, tl.minimum(Ks, end - start)):
                earlier = _count(rank, b, T, start, end, slot)
                value = _window(
                    x, x_t, at_x, conv_state, order, b, T, start, earlier, at_state, c_s, in_c, S, BS
                )
                to = tl.load(snapshot_indices + slot * N + n).to(tl.int64)
                at = to * c_n + i_c.to(tl.int64)[:, None] * c_c + i_s[None, :] * c_s
                elsewhere = in_c[:, None] & (i_s < tl.where((to == row) | (to < 0), 0, S))[None, :]
                tl.store(conv_state + at, narrow(value, conv_state.dtype.element_ty), mask=elsewhere)
                own, named = tl.where(to == row, value, own), named | (to == row)
        tl.debug_barrier()  # wait until this program's threads have read what is now written
        result = narrow(own, conv_state.dtype.element_ty)
        if conv_snapshots is not None:
            if end > start:
                at = n.to(tl.int64) * n_n + i_c.to(tl.int64)[:, None] * n_c + i_s[None, :] * n_w
                tl.store(conv_snapshots + at, result, mask=inside)
        written = count > 0
        if snapshot_indices is not None:
            written = named
        if written:
            tl.store(conv_state + at_state[:, None] + i_s[None, :] * c_s, result, mask=inside)


@triton.jit(do_not_specialize=["N", "T", "norm_eps"])
def gated_norm(
    o, z, norm_weight, out,           # o [B, T, HV, V] float32; z [B, T, groups, ..], [V] or None; out as o
    mask, cu_seqlens, state_indices,
    N, T, norm_eps, z_b, z_t, z_g, mask_b, mask_t,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, Z_GROUP: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The norm and its gate for BT tokens of one head. Grid: slots of BT tokens * HV."""
    pid = tl.program_id(0)
    hv = pid % HV
    n, b, first, end = chunk_at(pid // HV, cu_seqlens, N, T, 0, BT, False)
    t = first + tl.arange(0, BT)
    written = t < end
    live = written
    if state_indices is not None:
        live = t < tl.where(tl.load(state_indices + n) < 0, first, end)
    if mask is not None:
        live = live & (tl.load(mask + b * mask_b + t.to(tl.int64) * mask_t, mask=written, other=0) != 0)
    i_v = tl.arange(0, BV)
    in_v = (i_v < V)[None, :]
    at = ((b * T + t.to(tl.int64)) * HV + hv)[:, None] * V + i_v[None, :]
    x = tl.load(o + at, mask=live[:, None] & in_v, other=0.0)
    if norm_weight is not None:
        x *= inverse_length(tl.sum(squares(x, SMALL), 1) / V, tl.sum(squares(x, LARGE), 1) / V, norm_eps)[
            :, None
        ]
        x *= widen(tl.load(norm_weight + i_v, mask=i_v < V, other=0.0))[None, :]
    if z is not None:
        at_z = b * z_b + t.to(tl.int64)[:, None] * z_t + hv // Z_GROUP * z_g + hv % Z_GROUP * V + i_v[None, :]
        x *= gate_of(widen(tl.load(z + at_z, mask=live[:, None] & in_v, other=0.0)), GATE == "sigmoid")
    tl.store(out + at, narrow(x, out.dtype.element_ty), mask=written[:, None] & in_v)
