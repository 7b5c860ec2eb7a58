"""Prefill: the recurrence in chunks of C tokens, as products that run on tensor cores.

    S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
    d_t = beta_t (v_t - S^T r_t)      delta    r_t = k_t, or the call's erase_t with beta_t = 1
    S   = S + k_t d_t^T               update
    o_t = scale * S^T q_t             output

Within a chunk that starts from the state S0, with e(j, i) = exp(g_{j+1} + ... + g_i) (elementwise over K for KDA),
U [C, V] the rows d_t and E_i = exp(g_1 + ... + g_i):

    A_ij = beta_i <r_i * e(j, i), k_j>  for i > j         T = (I + A)^-1 diag(beta)
    P_ij = scale <q_i * e(j, i), k_j>   for i >= j
    U    = T (v - (r * E) S0)                             the WY form (Gated DeltaNet, arXiv 2412.06464, section 3.3)
    o    = scale (q * E) S0 + P U
    S    = diag(E_C) S0 + (k * e(., C))^T U

`scores` (KDA only) and `prepare` work on all chunks at once and produce T and P. `scan` walks through the chunks of a
sequence, with one program per head and BV columns of the state, in float32 registers. For GDA in bfloat16 it multiplies
rows of k and q directly and applies the decays to the products. In all other cases `operands` first writes split
factors for all programs of the scan.

Every exponent is a sum of log decays, never a difference of two such sums. So it is <= 0, it keeps its precision beside
large ones, and with -inf among the terms it is -inf, not NaN. Factors that are not bfloat16 numbers are split in two
(common.split), so tensor cores keep 16 bits of each.
"""

import triton
import triton.language as tl

from .chunk_parts import (
    FACTORS,
    alive,
    chunk_decays,
    chunk_of,
    first_slot,
    gate_parameters,
    gate_rows,
    inverse,
    normed,
    pair_decays,
    parts,
    rows,
    store_split,
)
from .common import narrow, product, qk_head, split, tokens_of, widen, write_strength


@triton.jit(do_not_specialize=["N", "T", "Ks", "scale", "eps", "lower_bound"])
def scores(
    q, k, g, erase, A_log, dt_bias, mask, cu_seqlens, state_indices,
    out,                              # [slots, HV, 2, C, C] float32: A without beta, P; where i >= j
    N, T, Ks, scale, eps, lower_bound,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, erase_b, erase_t, erase_h, mask_b, mask_t,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr,
    DECAY: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, TILED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """KDA: <r_i * e(j, i), k_j> and scale <q_i * e(j, i), k_j> for 16 tokens i of a chunk and all its j <= i.

    Grid: slots * HV * C / 16. Columns of earlier blocks of 16 are factored at the first token of the block of i. Within
    the block every pair has its own exponent, and the sum over K is computed for one j at a time.
    """
    NB: tl.constexpr = C // 16
    pid = tl.program_id(0)
    block = pid % NB
    slot, hv, b, chunk, end = chunk_of(pid // NB, cu_seqlens, state_indices, N, T, Ks, HV, C, TAIL)
    start = chunk + block * 16
    if start >= end:
        return

    h = qk_head(hv, H, HV, TILED)
    i_k = tl.arange(0, BK)
    in_k = i_k < K
    r = tl.arange(0, 16)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    g += b * g_b + hv * g_h
    if mask is not None:
        mask += b * mask_b
    A, bias = gate_parameters(A_log, dt_bias, hv, i_k, in_k, K, True, DECAY)
    out += (slot.to(tl.int64) * HV + hv) * (2 * C * C) + (block * 16 + r)[:, None] * C

    t = start + r
    live = alive(mask, mask_t, t, end)
    k_i = normed(k, k_t, t, live, i_k, in_k, eps, L2NORM)
    r_i = k_i
    if erase is not None:
        r_i = widen(
            rows(erase + b * erase_b + (hv if ERASE == HV else h) * erase_h, erase_t, t, live, i_k, in_k)
        )
    q_i = normed(q, q_t, t, live, i_k, in_k, eps, L2NORM) * scale
    g_i = gate_rows(g, g_t, t, live, i_k, in_k, A, bias, lower_bound, DECAY, BOUNDED)

    # Within the block: D_i = g_{j+1} + ... + g_i grows by one term as j goes down.
    D = tl.zeros([16, BK], tl.float32)
    kk = tl.zeros([16, 16], tl.float32)
    qk = tl.zeros([16, 16], tl.float32)
    for step in range(0, 16):
        j = 15 - step
        k_j = tl.sum(tl.where(r[:, None] == j, k_i, 0.0), 0)  # [BK]
        term = k_j[None, :] * tl.exp(D)
        kk = tl.where(r[None, :] == j, tl.sum(r_i * term, 1)[:, None], kk)
        qk = tl.where(r[None, :] == j, tl.sum(q_i * term, 1)[:, None], qk)
        g_j = tl.sum(tl.where(r[:, None] == j, g_i, 0.0), 0)
        D += tl.where(r[:, None] >= j, g_j[None, :], 0.0)
    columns = (block * 16 + r)[None, :]
    tl.store(out + columns, kk)
    tl.store(out + C * C + columns, qk)

    # Earlier blocks: e(j, i) = exp(sum from j + 1 to the block's start) * exp(sum from there to i).
    to_i = tl.exp(tl.cumsum(g_i, 0))
    r_high, r_low = split(r_i * to_i)
    q_high, q_low = split(q_i * to_i)
    between = tl.zeros([BK], tl.float32)
    for step in range(0, block):
        J = block - 1 - step
        t = chunk + J * 16 + r
        live = alive(mask, mask_t, t, end)
        k_j = normed(k, k_t, t, live, i_k, in_k, eps, L2NORM)
        g_next = gate_rows(
            g, g_t, t + 1, alive(mask, mask_t, t + 1, end) & (r < 15), i_k, in_k, A, bias, lower_bound, DECAY, BOUNDED
        )  # fmt: skip
        to_block = between[None, :] + tl.cumsum(g_next, 0, reverse=True)
        j_high, j_low = split(k_j * tl.exp(to_block))
        j_high = tl.trans(j_high)
        j_low = tl.trans(j_low)
        zero = tl.zeros([16, 16], tl.float32)
        columns = (J * 16 + r)[None, :]
        tl.store(out + columns, product(r_high, r_low, j_high, j_low, zero, False, False))
        tl.store(out + C * C + columns, product(q_high, q_low, j_high, j_low, zero, False, False))
        g_j = gate_rows(g, g_t, t, live, i_k, in_k, A, bias, lower_bound, DECAY, BOUNDED)
        between += tl.sum(g_j, 0)


@triton.jit(do_not_specialize=["N", "T", "Ks", "scale", "eps", "lower_bound"])
def prepare(
    q, k, g, beta, erase, A_log, dt_bias, mask, cu_seqlens, state_indices,
    found,                            # [slots, HV, 2, C, C] float32: A without beta, P; from `scores` for KDA
    out,                              # [slots, HV, 4, C, C] bfloat16: T (or Y) high, low, P high, low
    factors,                          # [slots, HV, FACTORS, C] float32: factors of rows of k, q, and again k
    N, T, Ks, scale, eps, lower_bound,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    erase_b, erase_t, erase_h, mask_b, mask_t,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    KDA: tl.constexpr, DECAY: tl.constexpr, BOUNDED: tl.constexpr, LOGIT: tl.constexpr, L2NORM: tl.constexpr,
    TILED: tl.constexpr, ERASE: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr, BACKWARD: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """T, P and the factors of one chunk and head. Grid: slots * HV. EXACT: q and k are bfloat16.

    Factors, if EXACT: E_i / |k_i|, or E_i with erase; scale E_i / |q_i|; e(i, C) / |k_i|; E_C. BACKWARD: Y instead of T
    (see chunk_backward.py), and the factor beta and, for GDA, `found` are written too.
    """
    slot, hv, b, start, end = chunk_of(tl.program_id(0), cu_seqlens, state_indices, N, T, Ks, HV, C, TAIL)
    if start >= end:
        return

    i = tl.arange(0, C)
    t = start + i
    if mask is not None:
        mask += b * mask_b
    live = alive(mask, mask_t, t, end)
    if erase is None:
        strength = tl.load(beta + b * beta_b + hv * beta_h + t.to(tl.int64) * beta_t, mask=live, other=0.0)
        strength = tl.where(live, write_strength(strength, LOGIT), 0.0)
    else:
        strength = tl.where(live, 1.0, 0.0)
    below = i[:, None] > i[None, :]
    upto = i[:, None] >= i[None, :]
    at_factors = (slot.to(tl.int64) * HV + hv) * (FACTORS * C) + i
    at_found = (slot.to(tl.int64) * HV + hv) * (2 * C * C) + i[:, None] * C + i[None, :]
    if KDA:
        A = tl.load(found + at_found, mask=below & (t < end)[:, None], other=0.0)
        P = tl.load(found + at_found + C * C, mask=upto & (t < end)[:, None], other=0.0)
    else:
        h = qk_head(hv, H, HV, TILED)
        q += b * q_b + h * q_h
        k += b * k_b + h * k_h
        if erase is not None:
            erase += b * erase_b + (hv if ERASE == HV else h) * erase_h
        A = tl.zeros([C, C], tl.float32)
        P = tl.zeros([C, C], tl.float32)
        k_length = tl.zeros([C], tl.float32)
        q_length = tl.zeros([C], tl.float32)
        # 32 channels at a time: split rows of 128 would not fit the registers
        for first in range(0, BK, SLICE):
            i_k = first + tl.arange(0, SLICE)
            rows_q = rows(q, q_t, t, live, i_k, i_k < K)
            rows_k = rows(k, k_t, t, live, i_k, i_k < K)
            k_high, k_low = parts(rows_k, EXACT)
            q_high, q_low = parts(rows_q, EXACT)
            r_high = k_high
            r_low = k_low
            if erase is not None:
                r_high, r_low = parts(rows(erase, erase_t, t, live, i_k, i_k < K), EXACT)
            A = product(r_high, r_low, tl.trans(k_high), tl.trans(k_low), A, EXACT, EXACT)
            P = product(q_high, q_low, tl.trans(k_high), tl.trans(k_low), P, EXACT, EXACT)
            if L2NORM:
                k_length += tl.sum(widen(rows_k) * widen(rows_k), 1)
                q_length += tl.sum(widen(rows_q) * widen(rows_q), 1)
        r_k = tl.full([C], 1.0, tl.float32)
        r_q = tl.full([C], 1.0, tl.float32)
        if L2NORM:
            r_k = tl.rsqrt(tl.where(live, k_length + eps, 1.0))
            r_q = tl.rsqrt(tl.where(live, q_length + eps, 1.0))
        r_r = r_k
        if erase is not None:
            r_r = tl.full([C], 1.0, tl.float32)
        A_gate, bias = gate_parameters(A_log, dt_bias, hv, i, live, K, False, DECAY)
        g += b * g_b + hv * g_h
        gate, E, to_end, last = chunk_decays(
            g, g_t, mask, mask_t, t, end, i, live, A_gate, bias, lower_bound, C, False, DECAY, BOUNDED
        )
        decay = pair_decays(gate, C)
        A = tl.where(below, A * decay * (r_r[:, None] * r_k[None, :]), 0.0)
        P = tl.where(upto, P * (scale * decay) * (r_q[:, None] * r_k[None, :]), 0.0)
        if BACKWARD:
            tl.store(found + at_found, A)
            tl.store(found + at_found + C * C, P)
        if EXACT:
            tl.store(factors + at_factors, E * r_r)
            tl.store(factors + at_factors + C, scale * E * r_q)
            tl.store(factors + at_factors + 2 * C, to_end * r_k)
            tl.store(factors + at_factors + 3 * C, i * 0.0 + last)

    if BACKWARD:
        tl.store(factors + at_factors + 4 * C, strength)
        solved = inverse(A * strength[None, :], C)
    else:
        solved = inverse(A * strength[:, None], C) * strength[None, :]
    at = (slot.to(tl.int64) * HV + hv) * (4 * C * C) + i[:, None] * C + i[None, :]
    high, low = split(solved)
    tl.store(out + at, narrow(high, tl.bfloat16))
    tl.store(out + at + C * C, narrow(low, tl.bfloat16))
    high, low = split(P)
    tl.store(out + at + 2 * C * C, narrow(high, tl.bfloat16))
    tl.store(out + at + 3 * C * C, narrow(low, tl.bfloat16))


@triton.jit(do_not_specialize=["N", "T", "Ks", "scale", "eps", "lower_bound"])
def operands(
    q, k, g, erase, A_log, dt_bias, mask, cu_seqlens, state_indices,
    out,                              # [slots, HV, 6, C, K] bfloat16: r * E, scale (q * E), k * e(., C); high, low each
    last,                             # [slots, HV, K] float32: E_C
    N, T, Ks, scale, eps, lower_bound,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, erase_b, erase_t, erase_h, mask_b, mask_t,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, KDA: tl.constexpr,
    ERASE: tl.constexpr,
    DECAY: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr, TILED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The factors by which the scan multiplies the state and U, for one chunk and head. Grid: slots * HV."""
    slot, hv, b, start, end = chunk_of(tl.program_id(0), cu_seqlens, state_indices, N, T, Ks, HV, C, TAIL)
    if start >= end:
        return

    h = qk_head(hv, H, HV, TILED)
    i = tl.arange(0, C)
    i_k = tl.arange(0, BK)
    in_k = i_k < K
    t = start + i
    if mask is not None:
        mask += b * mask_b
    live = alive(mask, mask_t, t, end)
    A, bias = gate_parameters(A_log, dt_bias, hv, i_k, in_k, K, KDA, DECAY)
    g += b * g_b + hv * g_h
    _, E, to_end, E_C = chunk_decays(
        g, g_t, mask, mask_t, t, end, i_k, in_k, A, bias, lower_bound, C, KDA, DECAY, BOUNDED
    )
    if not KDA:
        E = E[:, None]
        to_end = to_end[:, None]
        E_C = i_k * 0.0 + E_C
    at = (slot.to(tl.int64) * HV + hv) * (6 * C * K) + i[:, None] * K + i_k[None, :]
    tl.store(last + (slot.to(tl.int64) * HV + hv) * K + i_k, E_C, mask=in_k)
    row = normed(k + b * k_b + h * k_h, k_t, t, live, i_k, in_k, eps, L2NORM)
    store_split(out + at + 4 * C * K, row * to_end, C * K, in_k[None, :])
    if erase is not None:
        row = widen(
            rows(erase + b * erase_b + (hv if ERASE == HV else h) * erase_h, erase_t, t, live, i_k, in_k)
        )
    store_split(out + at, row * E, C * K, in_k[None, :])
    row = normed(q + b * q_b + h * q_h, q_t, t, live, i_k, in_k, eps, L2NORM)
    store_split(out + at + 2 * C * K, row * E * scale, C * K, in_k[None, :])


@triton.jit(do_not_specialize=["N", "T", "Ks"])
def scan(
    q, k, v, o,                       # q, k [B, T, H, K]; v, o [B, T, HV, V]
    erase,                            # [B, T, ERASE, K] or None
    solved, factors,                  # what `prepare` wrote
    ready, ready_last,                # what `operands` wrote, if not EXACT
    state, state_out,                 # [N or P, HV, K, V], may be None
    pieces,                           # [N * HV, SEGMENTS, K, V + K] float32, for more than one segment
    states,                           # [slots, HV, K, V] float32 for the backward pass, else None
    mask, cu_seqlens, state_indices,
    N, T, Ks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    erase_b, erase_t, erase_h, mask_b, mask_t,
    s_n, s_h, s_k, s_v, u_n, u_h, u_k, u_v,  # strides of state and state_out
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TILED: tl.constexpr, ERASE: tl.constexpr, POOL_OUT: tl.constexpr, TAIL: tl.constexpr,
    EXACT: tl.constexpr, SEGMENTS: tl.constexpr, TRANSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The walk through the chunks of a sequence. Grid: N * HV * segments * column blocks. EXACT: GDA in bfloat16.

    With few heads a long sequence is cut into SEGMENTS. A first launch (TRANSITIONS, all segments except the last)
    finds the effect of each on the state it starts from, S -> M S + B: M by running the rule with v = 0 from the
    identity, B by running it from zero. The second launch starts each segment from M_s (... (M_1 B_0 + B_1)) + B_s.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NM: tl.constexpr = (K + BV - 1) // BV if TRANSITIONS else 0
    COUNT: tl.constexpr = SEGMENTS - 1 if TRANSITIONS else SEGMENTS
    pid = tl.program_id(0)
    column = pid % (NV + NM)
    segment = pid // (NV + NM) % COUNT
    hv = pid // ((NV + NM) * COUNT) % HV
    n = pid // ((NV + NM) * COUNT * HV)
    h = qk_head(hv, H, HV, TILED)
    i_k = tl.arange(0, BK)
    in_k = i_k < K
    i_c = tl.arange(0, C)
    of_state = column < NV
    i_v = tl.where(of_state, column, column - NV) * BV + tl.arange(0, BV)
    in_v = i_v < tl.where(of_state, V, K)
    inside = in_k[:, None] & in_v[None, :]

    b, start, end = tokens_of(n, cu_seqlens, T)
    if TAIL:
        end = tl.maximum(start, end - Ks)
    chunks = tl.cdiv(end - start, C)
    each = tl.cdiv(chunks, SEGMENTS)
    first = segment * each
    last = tl.minimum(first + each, chunks)
    row = n.to(tl.int64)
    if state_indices is not None:
        row = tl.load(state_indices + n).to(tl.int64)
    o += (b * T * HV + hv) * V
    out_row = n.to(tl.int64)
    if POOL_OUT:
        out_row = row
    at_state = i_k[:, None] * s_k + i_v[None, :] * s_v
    at_out = out_row * u_n + hv * u_h + i_k[:, None] * u_k + i_v[None, :] * u_v
    own = (n.to(tl.int64) * HV + hv) * SEGMENTS * (K * (V + K)) + i_k[:, None] * (V + K)

    if row < 0:  # skipped
        if not TRANSITIONS and states is None:
            nothing = tl.zeros([C, BV], o.dtype.element_ty)
            for c in range(first, last):
                t = start + c * C + i_c
                at = t.to(tl.int64)[:, None] * (HV * V) + i_v[None, :]
                tl.store(o + at, nothing, mask=(t < end)[:, None] & in_v[None, :])
            if state_out is not None and not POOL_OUT:
                if segment == SEGMENTS - 1:
                    empty = tl.zeros([BK, BV], state_out.dtype.element_ty)
                    tl.store(state_out + at_out, empty, mask=inside)
        return

    S = tl.zeros([BK, BV], tl.float32)
    if SEGMENTS == 1:
        if state is not None:
            at = row * s_n + hv * s_h + at_state
            S = widen(tl.load(state + at, mask=inside, other=0.0))
    elif TRANSITIONS:
        if of_state:
            if segment == 0:
                if state is not None:
                    at = row * s_n + hv * s_h + at_state
                    S = widen(tl.load(state + at, mask=inside, other=0.0))
                # Kept for segment 0 of the second launch: in place, another program overwrites the state.
                tl.store(pieces + own + (SEGMENTS - 1) * (K * (V + K)) + i_v[None, :], S, mask=inside)
        else:
            if segment == 0:  # its start is known
                return
            S = tl.where(i_k[:, None] == i_v[None, :], 1.0, 0.0)
    else:
        if segment == 0:
            at = own + (SEGMENTS - 1) * (K * (V + K)) + i_v[None, :]
            S = tl.load(pieces + at, mask=inside, other=0.0)
        else:
            S = tl.load(pieces + own + i_v[None, :], mask=inside, other=0.0)
            for s in range(1, segment):
                if s * each < chunks:
                    at = own + s * (K * (V + K))
                    M = tl.load(pieces + at + V + i_k[None, :], mask=in_k[:, None] & in_k[None, :], other=0.0)
                    B = tl.load(pieces + at + i_v[None, :], mask=inside, other=0.0)
                    m_high, m_low = split(M)
                    s_high, s_low = split(S)
                    S = product(m_high, m_low, s_high, s_low, B, False, False)

    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + hv * v_h
    if erase is not None:
        erase += b * erase_b + (hv if ERASE == HV else h) * erase_h
    if mask is not None:
        mask += b * mask_b
    slot = first_slot(n, cu_seqlens, T, C).to(tl.int64)
    i_cc = i_c[:, None] * C + i_c[None, :]

    for c in tl.range(first, last, num_stages=STAGES):
        t = start + c * C + i_c
        live = alive(mask, mask_t, t, end)
        at_o = t.to(tl.int64)[:, None] * (HV * V) + i_v[None, :]
        at_cc = ((slot + c) * HV + hv) * (4 * C * C) + i_cc
        T_high = tl.load(solved + at_cc)
        T_low = tl.load(solved + at_cc + C * C)
        R = widen(rows(v, v_t, t, live, i_v, i_v < tl.where(of_state, V, 0)))
        S_high, S_low = split(S)
        zero = tl.zeros([C, BV], tl.float32)
        at_factors = ((slot + c) * HV + hv) * (FACTORS * C) + i_c
        at_ready = ((slot + c) * HV + hv) * (6 * C * K) + i_c[:, None] * K + i_k[None, :]

        # R = v - (r * E) S,  U = T R
        if EXACT:
            rows_k = rows(k, k_t, t, live, i_k, in_k)
            to_k = tl.load(factors + at_factors)
            rows_r = rows_k
            if erase is not None:
                rows_r = rows(erase, erase_t, t, live, i_k, in_k)
            R -= product(rows_r, rows_r, S_high, S_low, zero, True, False) * to_k[:, None]
        else:
            k_high = tl.load(ready + at_ready, mask=in_k[None, :], other=0.0)
            k_low = tl.load(ready + at_ready + C * K, mask=in_k[None, :], other=0.0)
            R -= product(k_high, k_low, S_high, S_low, zero, False, False)
        R_high, R_low = split(R)
        U = product(T_high, T_low, R_high, R_low, zero, False, False)
        if states is not None:  # T is Y here: keep the chunk's initial state and D = Y R; U = beta D
            at_kept = ((slot + c) * HV + hv) * (K * V) + i_k[:, None] * V + i_v[None, :]
            tl.store(states + at_kept, S, mask=inside)
            tl.store(o + at_o, U, mask=(t < end)[:, None] & in_v[None, :])
            U *= tl.load(factors + at_factors + 4 * C)[:, None]
        U_high, U_low = split(U)

        # o = scale (q * E) S + P U
        if not TRANSITIONS and states is None:
            P_high = tl.load(solved + at_cc + 2 * C * C)
            P_low = tl.load(solved + at_cc + 3 * C * C)
            if EXACT:
                rows_q = rows(q, q_t, t, live, i_k, in_k)
                to_q = tl.load(factors + at_factors + C)
                out = product(rows_q, rows_q, S_high, S_low, zero, True, False) * to_q[:, None]
            else:
                q_high = tl.load(ready + at_ready + 2 * C * K, mask=in_k[None, :], other=0.0)
                q_low = tl.load(ready + at_ready + 3 * C * K, mask=in_k[None, :], other=0.0)
                out = product(q_high, q_low, S_high, S_low, zero, False, False)
            out = product(P_high, P_low, U_high, U_low, out, False, False)
            if mask is not None:
                out = tl.where(live[:, None], out, 0.0)
            tl.store(o + at_o, narrow(out, o.dtype.element_ty), mask=(t < end)[:, None] & in_v[None, :])

        # S = diag(E_C) S + (k * e(., C))^T U
        if EXACT:
            U_high, U_low = split(U * tl.load(factors + at_factors + 2 * C)[:, None])
            faded = S * tl.load(factors + ((slot + c) * HV + hv) * (FACTORS * C) + 3 * C)
            new = product(tl.trans(rows_k), tl.trans(rows_k), U_high, U_low, faded, True, False)
        else:
            k_high = tl.load(ready + at_ready + 4 * C * K, mask=in_k[None, :], other=0.0)
            k_low = tl.load(ready + at_ready + 5 * C * K, mask=in_k[None, :], other=0.0)
            at_last = ((slot + c) * HV + hv) * K + i_k
            faded = S * tl.load(ready_last + at_last, mask=in_k, other=0.0)[:, None]
            new = product(tl.trans(k_high), tl.trans(k_low), U_high, U_low, faded, False, False)
        if mask is not None:  # a chunk of padding leaves the bits of the state alone
            S = tl.where(tl.max(live.to(tl.int32), 0) > 0, new, S)
        else:
            S = new

    if TRANSITIONS:
        at = own + segment * (K * (V + K)) + tl.where(of_state, i_v, i_v + V)[None, :]
        tl.store(pieces + at, S, mask=inside)
    elif state_out is not None:
        if segment == SEGMENTS - 1:
            tl.store(state_out + at_out, narrow(S, state_out.dtype.element_ty), mask=inside)
