"""Gradients of prefill, chunk by chunk: chunk.py backwards.

With the notation of chunk.py, a_ij = <k_i * e(j, i), k_j> for i > j and R = v - (k * E) S0, the rows d_t of a chunk are
U = diag(beta) D with D = Y R, Y = (I + a diag(beta))^-1: nothing is divided by beta, which may be 0. The forward pass
runs again for the S0 and D of every chunk. With dX the gradient of X, from the last chunk to the first (`back`):

    dU  = P^T dO + (k * e(., C)) dS
    dR  = Y^T (beta dU) = dv
    dS0 = diag(E_C) dS + scale (q * E)^T dO - (k * E)^T dR

and for all chunks at once (`pairs`, `gradients`), from Q = dO D^T for i >= j and Z = dR D^T for i > j:

    dP_ij   =  Q_ij beta_j              db = D dS^T, the gradient of the rows k * e(., C), without beta
    da_ij   = -Z_ij beta_j
    dbeta_j = sum_i P_ij Q_ij - sum_i a_ij Z_ij + <k_j * e(j, C), db_j>
    dq_i    = scale (E_i * (dO S0^T)_i + sum_j dP_ij e(j, i) k_j)
    dk_i    = beta_i e(i, C) db_i - E_i * (dR S0^T)_i
              + sum_j<i da_ij e(j, i) k_j + sum_l>i da_li e(i, l) k_l + sum_l>=i scale dP_li e(i, l) q_l

A log decay g_t is part of e(j, i) if j < t <= i. With w_ij = da_ij a_ij + dP_ij P_ij for i > j (elementwise over K):

    dg_t = sum_{j < t <= i} w_ij + sum_{i >= t} (scale q_i E_i (dO S0^T)_i - k_i E_i (dR S0^T)_i)
           + sum_{j < t} beta_j k_j e(j, C) db_j + E_C sum_v S0 dS

Only terms with g_t are summed, never all terms minus the others. So the small gradient of a strong decay is precise.
(For the products over pairs KDA does take sum_{i >= t} of rows minus columns: both are the same float32 numbers.)

The formulas follow from those of chunk.py (Gated DeltaNet, arXiv 2412.06464, section 3.3) by the chain rule. Gradients
are float32, with one gradient of q and k (after the norm) per value head. The elementwise rest of the way to the inputs
is left to torch (backward.py).
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
    gate_row,
    inverse_lengths,
    pair_decays,
    parts,
    rows,
)
from .common import product, qk_head, split, tokens_of, widen


@triton.jit(do_not_specialize=["N", "T"])
def back(
    q, k, do,                         # q, k [B, T, H, K]; do [B, T, HV, V]
    solved, factors,                  # what `prepare` wrote: Y, P
    ready, ready_last,                # what `operands` wrote, if not EXACT
    d_state,                          # [N, HV, K, V]: gradient of the final state, may be None
    d_initial,                        # [N, HV, K, V] float32, written; may be None
    d_states,                         # [slots, HV, K, V] float32, written: gradient of the state a chunk ends with
    dv,                               # [B, T, HV, V] float32, written
    mask, cu_seqlens, state_indices,
    N, T,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, mask_b, mask_t,
    s_n, s_h, s_k, s_v, u_n, u_h, u_k, u_v,  # strides of d_state and d_initial
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TILED: tl.constexpr, EXACT: tl.constexpr, EXACT_O: tl.constexpr,
):  # fmt: skip
    """The walk back through the chunks of a sequence. Grid: N * HV * column blocks. EXACT_O: do is bfloat16.

    Nothing is written for a skipped sequence.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    hv = pid // NV % HV
    n = pid // (NV * HV)
    h = qk_head(hv, H, HV, TILED)
    i_k = tl.arange(0, BK)
    in_k = i_k < K
    i_c = tl.arange(0, C)
    i_v = pid % NV * BV + tl.arange(0, BV)
    in_v = i_v < V
    inside = in_k[:, None] & in_v[None, :]
    b, start, end = tokens_of(n, cu_seqlens, T)
    if state_indices is not None:
        if tl.load(state_indices + n) < 0:
            return

    dS = tl.zeros([BK, BV], tl.float32)
    if d_state is not None:
        at = n.to(tl.int64) * s_n + hv * s_h + i_k[:, None] * s_k + i_v[None, :] * s_v
        dS = widen(tl.load(d_state + at, mask=inside, other=0.0))
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    do += b * do_b + hv * do_h
    dv += (b * T * HV + hv) * V
    if mask is not None:
        mask += b * mask_b
    slot = first_slot(n, cu_seqlens, T, C).to(tl.int64)
    i_cc = i_c[:, None] * C + i_c[None, :]
    chunks = tl.cdiv(end - start, C)
    for step in range(0, chunks):
        c = chunks - 1 - step
        t = start + c * C + i_c
        live = alive(mask, mask_t, t, end)
        at_kept = ((slot + c) * HV + hv) * (K * V) + i_k[:, None] * V + i_v[None, :]
        tl.store(d_states + at_kept, dS, mask=inside)
        at_cc = ((slot + c) * HV + hv) * (4 * C * C) + i_cc
        at_factors = ((slot + c) * HV + hv) * (FACTORS * C) + i_c
        at_ready = ((slot + c) * HV + hv) * (6 * C * K) + i_c[:, None] * K + i_k[None, :]
        dS_high, dS_low = split(dS)
        zero = tl.zeros([C, BV], tl.float32)

        # dU = P^T dO + (k * e(., C)) dS
        if EXACT:
            rows_k = rows(k, k_t, t, live, i_k, in_k)
            dU = product(rows_k, rows_k, dS_high, dS_low, zero, True, False)
            dU *= tl.load(factors + at_factors + 2 * C)[:, None]
        else:
            k_high = tl.load(ready + at_ready + 4 * C * K, mask=in_k[None, :], other=0.0)
            k_low = tl.load(ready + at_ready + 5 * C * K, mask=in_k[None, :], other=0.0)
            dU = product(k_high, k_low, dS_high, dS_low, zero, False, False)
        dO = rows(do, do_t, t, live, i_v, in_v)
        dO_high, dO_low = parts(dO, EXACT_O)
        P_high = tl.trans(tl.load(solved + at_cc + 2 * C * C))
        P_low = tl.trans(tl.load(solved + at_cc + 3 * C * C))
        dU = product(P_high, P_low, dO_high, dO_low, dU, False, EXACT_O)

        # dR = Y^T (beta dU)
        X_high, X_low = split(dU * tl.load(factors + at_factors + 4 * C)[:, None])
        Y_high = tl.trans(tl.load(solved + at_cc))
        Y_low = tl.trans(tl.load(solved + at_cc + C * C))
        dR = product(Y_high, Y_low, X_high, X_low, zero, False, False)
        at_v = t.to(tl.int64)[:, None] * (HV * V) + i_v[None, :]
        tl.store(dv + at_v, dR, mask=(t < end)[:, None] & in_v[None, :])

        # dS = diag(E_C) dS + scale (q * E)^T dO - (k * E)^T dR
        if EXACT:
            faded = dS * tl.load(factors + ((slot + c) * HV + hv) * (FACTORS * C) + 3 * C)
            dO_high, dO_low = split(widen(dO) * tl.load(factors + at_factors + C)[:, None])
            rows_q = tl.trans(rows(q, q_t, t, live, i_k, in_k))
            faded = product(rows_q, rows_q, dO_high, dO_low, faded, True, False)
            R_high, R_low = split(-dR * tl.load(factors + at_factors)[:, None])
            dS = product(tl.trans(rows_k), tl.trans(rows_k), R_high, R_low, faded, True, False)
        else:
            at_last = ((slot + c) * HV + hv) * K + i_k
            faded = dS * tl.load(ready_last + at_last, mask=in_k, other=0.0)[:, None]
            q_high = tl.trans(tl.load(ready + at_ready + 2 * C * K, mask=in_k[None, :], other=0.0))
            q_low = tl.trans(tl.load(ready + at_ready + 3 * C * K, mask=in_k[None, :], other=0.0))
            faded = product(q_high, q_low, dO_high, dO_low, faded, False, EXACT_O)
            k_high = tl.trans(tl.load(ready + at_ready, mask=in_k[None, :], other=0.0))
            k_low = tl.trans(tl.load(ready + at_ready + C * K, mask=in_k[None, :], other=0.0))
            R_high, R_low = split(-dR)
            dS = product(k_high, k_low, R_high, R_low, faded, False, False)

    if d_initial is not None:
        at = n.to(tl.int64) * u_n + hv * u_h + i_k[:, None] * u_k + i_v[None, :] * u_v
        tl.store(d_initial + at, dS, mask=inside)


@triton.jit(do_not_specialize=["N", "T", "scale", "lower_bound", "columns"])
def pairs(
    g, do,
    A_log, dt_bias, mask, cu_seqlens, state_indices,
    found, factors,                   # what `prepare` wrote: a and P, overwritten by da and dP; beta
    deltas, dv,                       # D and dR [B, T, HV, V] float32, from `scan` and `back`
    dg, dbeta,                        # written: the part from pairs of tokens; dg [B, T, HV] for GDA only
    N, T, scale, lower_bound,
    columns,                          # V: hidden from the compiler, which would unroll loops up to it
    g_b, g_t, g_h, do_b, do_t, do_h, mask_b, mask_t,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KDA: tl.constexpr,
    DECAY: tl.constexpr, BOUNDED: tl.constexpr, EXACT_O: tl.constexpr,
):  # fmt: skip
    """da and dP of one chunk and head, for GDA with the decay e(j, i); dP with scale. Grid: slots * HV."""
    slot, hv, b, start, end = chunk_of(tl.program_id(0), cu_seqlens, state_indices, N, T, 0, HV, C, False)
    if start >= end:
        return
    i = tl.arange(0, C)
    t = start + i
    if mask is not None:
        mask += b * mask_b
    live = alive(mask, mask_t, t, end)
    written = t < end
    do += b * do_b + hv * do_h
    own = slot.to(tl.int64) * HV + hv
    token = (b * T + t.to(tl.int64)) * HV + hv  # [C]: the row of a dense [B, T, HV, ..]
    below = i[:, None] > i[None, :]
    upto = i[:, None] >= i[None, :]

    # Q = dO D^T, Z = dR D^T
    Q = tl.zeros([C, C], tl.float32)
    Z = tl.zeros([C, C], tl.float32)
    for first in range(0, columns, BV):
        i_v = first + tl.arange(0, BV)
        at_v = token[:, None] * V + i_v[None, :]
        in_v = written[:, None] & (i_v < V)[None, :]
        D_high, D_low = split(tl.load(deltas + at_v, mask=in_v, other=0.0))
        D_high = tl.trans(D_high)
        D_low = tl.trans(D_low)
        dO_high, dO_low = parts(rows(do, do_t, t, live, i_v, i_v < V), EXACT_O)
        Q = product(dO_high, dO_low, D_high, D_low, Q, EXACT_O, False)
        R_high, R_low = split(tl.load(dv + at_v, mask=in_v, other=0.0))
        Z = product(R_high, R_low, D_high, D_low, Z, False, False)
    at_found = found + own * (2 * C * C) + i[:, None] * C + i[None, :]
    a = tl.load(at_found, mask=below & written[:, None], other=0.0)
    P = tl.load(at_found + C * C, mask=upto & written[:, None], other=0.0)
    Q = tl.where(upto, Q, 0.0)
    Z = tl.where(below, Z, 0.0)
    tl.store(dbeta + token, tl.sum(P * Q - a * Z, 0), mask=written)
    strength = tl.load(factors + own * (FACTORS * C) + 4 * C + i)
    dP = Q * strength[None, :]
    da = -Z * strength[None, :]
    if not KDA:
        w = tl.where(below, da * a + dP * P, 0.0)
        through = tl.cumsum(w, 1) - w  # [i, t]: sum over j < t
        tl.store(dg + token, tl.sum(tl.where(upto, through, 0.0), 0), mask=written)
        A_gate, bias = gate_parameters(A_log, dt_bias, hv, i, live, K, False, DECAY)
        gate = gate_row(g + b * g_b + hv * g_h, g_t, t, live, A_gate, bias, lower_bound, DECAY, BOUNDED)
        decay = pair_decays(gate, C)
        da *= decay
        dP *= decay
    tl.store(at_found, da)
    tl.store(at_found + C * C, dP * scale)


@triton.jit(do_not_specialize=["N", "T", "scale", "eps", "lower_bound", "channels", "columns"])
def gradients(
    q, k, g, do,
    A_log, dt_bias, mask, cu_seqlens, state_indices,
    found, factors,                   # da and dP from `pairs`; beta
    states, deltas,                   # S0 [slots, HV, K, V] and D [B, T, HV, V] float32, from `scan`
    d_states, dv,                     # dS and dR, from `back`
    dq, dk,                           # [B, T, HV, K] float32, written
    dg, dbeta,                        # [B, T, HV(, K)], [B, T, HV] float32; dbeta and GDA's dg hold a part already
    N, T, scale, eps, lower_bound,
    channels, columns,                # K and V: hidden from the compiler, which would unroll loops up to them
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h, mask_b, mask_t,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, KDA: tl.constexpr, DECAY: tl.constexpr, BOUNDED: tl.constexpr, L2NORM: tl.constexpr,
    TILED: tl.constexpr, EXACT_O: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, g and beta for one chunk and head. Grid: slots * HV. SLICE channels at a time."""
    slot, hv, b, start, end = chunk_of(tl.program_id(0), cu_seqlens, state_indices, N, T, 0, HV, C, False)
    if start >= end:
        return
    h = qk_head(hv, H, HV, TILED)
    i = tl.arange(0, C)
    t = start + i
    if mask is not None:
        mask += b * mask_b
    live = alive(mask, mask_t, t, end)
    written = t < end
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    g += b * g_b + hv * g_h
    do += b * do_b + hv * do_h
    own = slot.to(tl.int64) * HV + hv
    token = (b * T + t.to(tl.int64)) * HV + hv  # [C]: the row of a dense [B, T, HV, ..]
    below = i[:, None] > i[None, :]
    at_found = found + own * (2 * C * C) + i[:, None] * C + i[None, :]

    r_q = tl.full([C], 1.0, tl.float32)
    r_k = tl.full([C], 1.0, tl.float32)
    if L2NORM:
        every_k = tl.arange(0, BK)
        r_q = inverse_lengths(rows(q, q_t, t, live, every_k, every_k < K), eps)
        r_k = inverse_lengths(rows(k, k_t, t, live, every_k, every_k < K), eps)
    strength = tl.load(factors + own * (FACTORS * C) + 4 * C + i)
    d_beta = tl.load(dbeta + token, mask=written, other=0.0)
    if not KDA:
        d_gate = tl.load(dg + token, mask=written, other=0.0)
        later = tl.zeros([C], tl.float32)
        earlier = tl.zeros([C], tl.float32)

    for first in range(0, channels, SLICE):
        i_k = first + tl.arange(0, SLICE)
        in_k = i_k < K
        # (dO S0^T), (dR S0^T), db = D dS^T
        from_o = tl.zeros([C, SLICE], tl.float32)
        from_r = tl.zeros([C, SLICE], tl.float32)
        db = tl.zeros([C, SLICE], tl.float32)
        fade = tl.zeros([SLICE], tl.float32)
        for first_v in range(0, columns, BV):
            i_v = first_v + tl.arange(0, BV)
            at_v = token[:, None] * V + i_v[None, :]
            in_v = written[:, None] & (i_v < V)[None, :]
            at_s = own * (K * V) + i_k[:, None] * V + i_v[None, :]
            in_s = in_k[:, None] & (i_v < V)[None, :]
            S = tl.load(states + at_s, mask=in_s, other=0.0)
            dS = tl.load(d_states + at_s, mask=in_s, other=0.0)
            fade += tl.sum(S * dS, 1)
            S_high, S_low = split(S)
            S_high = tl.trans(S_high)
            S_low = tl.trans(S_low)
            dO_high, dO_low = parts(rows(do, do_t, t, live, i_v, i_v < V), EXACT_O)
            from_o = product(dO_high, dO_low, S_high, S_low, from_o, EXACT_O, False)
            R_high, R_low = split(tl.load(dv + at_v, mask=in_v, other=0.0))
            from_r = product(R_high, R_low, S_high, S_low, from_r, False, False)
            D_high, D_low = split(tl.load(deltas + at_v, mask=in_v, other=0.0))
            S_high, S_low = split(dS)
            db = product(D_high, D_low, tl.trans(S_high), tl.trans(S_low), db, False, False)

        A_gate, bias = gate_parameters(A_log, dt_bias, hv, i_k, in_k, K, KDA, DECAY)
        gate, E, to_end, E_C = chunk_decays(
            g, g_t, mask, mask_t, t, end, i_k, in_k, A_gate, bias, lower_bound, C, KDA, DECAY, BOUNDED
        )
        row_q = widen(rows(q, q_t, t, live, i_k, in_k)) * r_q[:, None]
        row_k = widen(rows(k, k_t, t, live, i_k, in_k)) * r_k[:, None]
        if not KDA:
            E = E[:, None]
            to_end = to_end[:, None]
        d_q = from_o * E * scale
        d_k = -from_r * E
        db *= to_end
        d_beta += tl.sum(row_k * db, 1)
        db *= strength[:, None]
        da = tl.load(at_found)
        dP = tl.load(at_found + C * C)

        if KDA:
            # Pair by pair, because each channel has its own decay. j goes down, so that log e(j, i) grows by one term.
            same = tl.sum(tl.where(below, 0.0, dP), 1)[:, None]  # the pairs i = j, which have no decay
            k_late = tl.zeros([C, SLICE], tl.float32)
            q_late = tl.zeros([C, SLICE], tl.float32)
            early = tl.zeros([C, SLICE], tl.float32)
            log_e = tl.zeros([C, SLICE], tl.float32)
            for step in range(0, C):
                j = C - 1 - step
                is_j = (i == j)[:, None]
                e = tl.exp(log_e)
                e_k = e * tl.sum(tl.where(is_j, row_k, 0.0), 0)[None, :]
                column = own * (2 * C * C) + i * C + j
                da_j = tl.load(found + column)[:, None]
                dP_j = tl.where(i > j, tl.load(found + column + C * C), 0.0)[:, None]
                q_late += dP_j * e_k
                k_late += da_j * e_k
                early = tl.where(is_j, tl.sum(e * (dP_j * row_q + da_j * row_k), 0)[None, :], early)
                g_j = tl.sum(tl.where(is_j, gate, 0.0), 0)
                log_e += tl.where(i[:, None] >= j, g_j[None, :], 0.0)
            late = row_q * (d_q + q_late) + row_k * (d_k + k_late - early)
            d_gate = tl.cumsum(late, 0, reverse=True) + (fade * E_C)[None, :]
            # the sum over j < t as a product with ones
            before_high, before_low = split(row_k * db)
            ones_high, ones_low = split(tl.where(below, 1.0, 0.0))
            d_gate = product(ones_high, ones_low, before_high, before_low, d_gate, True, False)
            at = token[:, None] * K + i_k[None, :]
            tl.store(dg + at, tl.where(live[:, None], d_gate, 0.0), mask=written[:, None] & in_k[None, :])
            d_q += q_late + same * row_k
            d_k += k_late + early + same * row_q
        else:
            later += tl.sum(row_q * d_q + row_k * d_k, 1)
            earlier += tl.sum(row_k * db, 1)
            d_gate += E_C * tl.sum(fade, 0)
            q_high, q_low = split(row_q)
            k_high, k_low = split(row_k)
            a_high, a_low = split(da)
            d_k = product(a_high, a_low, k_high, k_low, d_k, False, False)
            d_k = product(tl.trans(a_high), tl.trans(a_low), k_high, k_low, d_k, False, False)
            a_high, a_low = split(dP)
            d_q = product(a_high, a_low, k_high, k_low, d_q, False, False)
            d_k = product(tl.trans(a_high), tl.trans(a_low), q_high, q_low, d_k, False, False)
        at = token[:, None] * K + i_k[None, :]
        inside = written[:, None] & in_k[None, :]
        tl.store(dq + at, d_q, mask=inside)
        tl.store(dk + at, d_k + db, mask=inside)

    tl.store(dbeta + token, d_beta, mask=written)
    if not KDA:
        d_gate += tl.cumsum(later, 0, reverse=True)
        d_gate += tl.sum(tl.where(below, earlier[None, :], 0.0), 1)
        tl.store(dg + token, tl.where(live, d_gate, 0.0), mask=written)
