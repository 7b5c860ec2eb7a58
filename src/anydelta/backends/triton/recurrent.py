"""Decode and short blocks: the recurrence token by token, with the state in registers.

    S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
    d_t = beta_t (v_t - S^T e_t)      delta    e_t = k_t, or the call's erase_t with beta_t = 1
    S   = S + k_t d_t^T               update
    o_t = scale * S^T q_t             output

One program owns the columns [K, BV] of the state of one sequence and value head. It reads them once, keeps them in
float32 registers for all its tokens, and writes them once. Programs share nothing, so the result does not depend on
their number. The lower bound for T = 1 is the state read and written: 2 * N * HV * K * V * bytes.
"""

import triton
import triton.language as tl

from .common import (
    LARGE,
    SMALL,
    gate_of,
    inverse_length,
    log_decay,
    narrow,
    qk_head,
    squares,
    tokens_of,
    widen,
    write_strength,
)


@triton.jit
def _token(
    q, k, v, g, beta, erase, mask, t, end,
    q_t, k_t, v_t, g_t, beta_t, erase_t, mask_t, A, bias, lower_bound, eps,
    i_k, i_v, K: tl.constexpr, V: tl.constexpr,
    KDA: tl.constexpr, DECAY: tl.constexpr, BOUNDED: tl.constexpr, LOGIT: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """(q [BK], k [BK], e [BK], v [BV], decay [BK] or scalar, beta, live) of token t. Pointers point to the head's token
    0. Without erase, e is k.

    Masked tokens are not read. They may hold anything.
    """
    live = t < end
    at = t.to(tl.int64)
    if mask is not None:
        live = tl.load(mask + at * mask_t, mask=live, other=0) != 0
    in_k = i_k < tl.where(live, K, 0)
    in_v = i_v < tl.where(live, V, 0)
    row_q = widen(tl.load(q + at * q_t + i_k, mask=in_k, other=0.0))
    row_k = widen(tl.load(k + at * k_t + i_k, mask=in_k, other=0.0))
    row_v = widen(tl.load(v + at * v_t + i_v, mask=in_v, other=0.0))
    if erase is None:
        strength = write_strength(tl.load(beta + at * beta_t, mask=live, other=0.0), LOGIT)
    else:
        strength = tl.where(live, 1.0, 0.0)
    if KDA:
        gate = tl.load(g + at * g_t + i_k, mask=in_k, other=0.0)
    else:
        gate = tl.load(g + at * g_t, mask=live, other=0.0)
    if DECAY == "linear":
        decay = widen(gate)
    else:
        decay = tl.exp(log_decay(gate, A, bias, lower_bound, DECAY, BOUNDED))
    if L2NORM:
        row_q *= inverse_length(tl.sum(squares(row_q, SMALL)), tl.sum(squares(row_q, LARGE)), eps)
        row_k *= inverse_length(tl.sum(squares(row_k, SMALL)), tl.sum(squares(row_k, LARGE)), eps)
    row_e = row_k
    if erase is not None:
        row_e = widen(tl.load(erase + at * erase_t + i_k, mask=in_k, other=0.0))
    return row_q, row_k, row_e, row_v, decay, strength, live


@triton.jit
def _normed(o, live, z, weight, eps, V: tl.constexpr, GATE: tl.constexpr):
    """The norm of o [BV], all V columns of a token and head; z and weight [BV]. Zeros for a token that is not live."""
    out = o * inverse_length(tl.sum(squares(o, SMALL)) / V, tl.sum(squares(o, LARGE)) / V, eps) * weight
    if GATE != "":
        out *= gate_of(z, GATE == "sigmoid")
    return tl.where(live, out, 0.0)


@triton.jit
def _beside(z, norm_weight, t, z_t, i_v, live, V: tl.constexpr, GATE: tl.constexpr):
    """(z, weight of the norm) of token t, [BV] each; z points to the head's token 0."""
    in_v = i_v < tl.where(live, V, 0)
    row_z = tl.zeros(i_v.shape, tl.float32)
    if GATE != "":
        row_z = widen(tl.load(z + t.to(tl.int64) * z_t + i_v, mask=in_v, other=0.0))
    return row_z, widen(tl.load(norm_weight + i_v, mask=i_v < V, other=0.0))


@triton.jit(do_not_specialize=["N", "T", "Ks", "scale", "eps", "lower_bound", "norm_eps"])
def recurrent(
    q, k, v, g, beta, o,              # q, k [B, T, H, K]; v, o [B, T, HV, V]; g [B, T, HV(, K)]; beta [B, T, HV]
    erase,                            # [B, T, ERASE, K] instead of beta, or None
    state, state_out, snapshots,      # [N or P, HV, K, V]; [N or P, HV, K, V]; [Ks, N, HV, K, V]; each may be None
    A_log, dt_bias, mask,             # [HV]; [HV] or [HV, K]; [B, T] uint8; each may be None
    cu_seqlens, state_indices,        # [N + 1], [N]; may be None
    snapshot_indices,                 # [Ks, N] rows of snapshots or -1, which is then the pool; may be None
    z, norm_weight,                   # the mixer's: [B, T, groups, ..] or None; [V]; None without a norm
    plain, arrivals,                  # [B, T, HV, V] float32, [N, HV] int32 zeros: for a norm over several programs
    N, T, Ks, scale, eps, lower_bound, norm_eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    erase_b, erase_t, erase_h, mask_b, mask_t, z_b, z_t, z_g,
    s_n, s_h, s_k, s_v,               # strides of state, in elements, by axis and not by order in memory
    u_n, u_h, u_k, u_v,               # of state_out
    w_s, w_n, w_h, w_k, w_v,          # of snapshots
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KDA: tl.constexpr, DECAY: tl.constexpr, BOUNDED: tl.constexpr, LOGIT: tl.constexpr, L2NORM: tl.constexpr,
    TILED: tl.constexpr, ERASE: tl.constexpr, POOL_IN: tl.constexpr, POOL_OUT: tl.constexpr, TAIL: tl.constexpr,
    AHEAD: tl.constexpr, DOUBLE: tl.constexpr, GATE: tl.constexpr, Z_GROUP: tl.constexpr, VV: tl.constexpr,
):  # fmt: skip
    """Grid: N * HV * ceil(V / BV). POOL_IN, POOL_OUT: state, state_out are pools, with row state_indices[n] for
    sequence n; otherwise sequence n has row n. TAIL: only the last Ks tokens of a sequence; chunk.py has done the
    others. AHEAD: there is more than one token, so the next one is loaded early. DOUBLE: beta counts twice
    (allow_neg_eigval).

    With norm_weight o is normed over V and gated (GATE, by z), as in mixer_kernels.py. If a head has several programs,
    each leaves its columns in `plain`, and the last to finish norms all of them, so the sum has a fixed order. VV is V
    rounded up to a power of two.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    n = pid // (NV * HV)
    hv = pid // NV % HV
    h = qk_head(hv, H, HV, TILED)
    i_k = tl.arange(0, BK)
    i_v = (pid % NV) * BV + tl.arange(0, BV)
    in_k = i_k < K
    in_v = i_v < V

    b, start, end = tokens_of(n, cu_seqlens, T)
    if TAIL:
        start = tl.maximum(start, end - Ks)
    row = n.to(tl.int64)
    if state_indices is not None:
        row = tl.load(state_indices + n).to(tl.int64)

    o += (b * T * HV + hv) * V
    if row < 0:  # skipped: zeros out, nothing else read or written
        zero = tl.zeros([BV], o.dtype.element_ty)
        for i in range(start, end):
            t = i  # the interpreter's loop variable is an int, the assigned value a tensor
            tl.store(o + t.to(tl.int64) * (HV * V) + i_v, zero, mask=in_v)
        if state_out is not None and not POOL_OUT:
            at = n.to(tl.int64) * u_n + hv * u_h + i_k[:, None] * u_k + i_v[None, :] * u_v
            nothing = tl.zeros([BK, BV], state_out.dtype.element_ty)
            tl.store(state_out + at, nothing, mask=in_k[:, None] & in_v[None, :])
        return

    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        if POOL_IN:
            at = row * s_n
        else:
            at = n.to(tl.int64) * s_n
        at += hv * s_h + i_k[:, None] * s_k + i_v[None, :] * s_v
        S = widen(tl.load(state + at, mask=in_k[:, None] & in_v[None, :], other=0.0))

    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + hv * v_h
    g += b * g_b + hv * g_h
    if erase is not None:
        erase += b * erase_b + (hv if ERASE == HV else h) * erase_h
    else:
        beta += b * beta_b + hv * beta_h
    if norm_weight is not None:
        if GATE != "":
            z += b * z_b + hv // Z_GROUP * z_g + hv % Z_GROUP * V
        if NV > 1:
            plain += (b * T * HV + hv) * V
    if mask is not None:
        mask += b * mask_b
    A = 1.0
    bias = 0.0
    if DECAY == "raw":
        if A_log is not None:
            A = tl.exp(widen(tl.load(A_log + hv)))
        if dt_bias is not None:
            if KDA:
                bias = widen(tl.load(dt_bias + hv * K + i_k, mask=in_k, other=0.0))
            else:
                bias = widen(tl.load(dt_bias + hv))

    if AHEAD:
        # The next token is loaded while this one is computed: its address does not depend on the state.
        q1, k1, e1, v1, decay1, beta1, live1 = _token(
            q, k, v, g, beta, erase, mask, start, end, q_t, k_t, v_t, g_t, beta_t, erase_t, mask_t,
            A, bias, lower_bound, eps, i_k, i_v, K, V, KDA, DECAY, BOUNDED, LOGIT, L2NORM,
        )  # fmt: skip
    for i in range(start, end):
        t = i
        if AHEAD:
            qt, kt, et, vt, decay, strength, live = q1, k1, e1, v1, decay1, beta1, live1
            q1, k1, e1, v1, decay1, beta1, live1 = _token(
                q, k, v, g, beta, erase, mask, t + 1, end, q_t, k_t, v_t, g_t, beta_t, erase_t, mask_t,
                A, bias, lower_bound, eps, i_k, i_v, K, V, KDA, DECAY, BOUNDED, LOGIT, L2NORM,
            )  # fmt: skip
        else:
            qt, kt, et, vt, decay, strength, live = _token(
                q, k, v, g, beta, erase, mask, t, end, q_t, k_t, v_t, g_t, beta_t, erase_t, mask_t,
                A, bias, lower_bound, eps, i_k, i_v, K, V, KDA, DECAY, BOUNDED, LOGIT, L2NORM,
            )  # fmt: skip
        if DOUBLE:
            strength *= 2.0
        # S' = decay S;  d = beta (v - S'^T e);  S = S' + k d^T
        if KDA:
            faded = S * decay[:, None]
        else:
            faded = S * decay
        if erase is None:
            et = kt
        d = strength * (vt - tl.sum(faded * et[:, None], 0))
        fresh = faded + kt[:, None] * d[None, :]
        # o = scale * sum_k S[k, :] q[k]
        out = scale * tl.sum(fresh * qt[:, None], 0)
        if mask is not None:
            S = tl.where(live, fresh, S)
            out = tl.where(live, out, 0.0)
        else:
            S = fresh
        at_o = t.to(tl.int64) * (HV * V) + i_v
        if norm_weight is None:
            tl.store(o + at_o, narrow(out, o.dtype.element_ty), mask=in_v)
        elif NV == 1:
            row_z, weight = _beside(z, norm_weight, t, z_t, i_v, live, V, GATE)
            out = _normed(out, live, row_z, weight, norm_eps, V, GATE)
            tl.store(o + at_o, narrow(out, o.dtype.element_ty), mask=in_v)
        else:
            tl.store(plain + at_o, out, mask=in_v)
        if snapshots is not None:
            slot = end - 1 - t
            if slot < Ks:
                wanted = in_v
                if snapshot_indices is not None:
                    to = tl.load(snapshot_indices + slot * N + n).to(tl.int64)
                    wanted = i_v < tl.where(to >= 0, V, 0)
                    at = to * w_n + hv * w_h
                else:
                    at = slot.to(tl.int64) * w_s + n.to(tl.int64) * w_n + hv * w_h
                at += i_k[:, None] * w_k + i_v[None, :] * w_v
                rounded = narrow(S, snapshots.dtype.element_ty)
                tl.store(snapshots + at, rounded, mask=in_k[:, None] & wanted[None, :])

    if state_out is not None:
        if POOL_OUT:
            at = row * u_n
        else:
            at = n.to(tl.int64) * u_n
        at += hv * u_h + i_k[:, None] * u_k + i_v[None, :] * u_v
        tl.store(state_out + at, narrow(S, state_out.dtype.element_ty), mask=in_k[:, None] & in_v[None, :])

    if norm_weight is not None and NV > 1:
        tl.debug_barrier()  # all threads have stored their part of `plain`
        if tl.atomic_add(arrivals + n * HV + hv, 1, sem="acq_rel", scope="gpu") == NV - 1:
            every_v = tl.arange(0, VV)
            for i in range(start, end):
                t = i
                live = t < end
                if mask is not None:
                    live = tl.load(mask + t.to(tl.int64) * mask_t) != 0
                whole = tl.load(plain + t.to(tl.int64) * (HV * V) + every_v, mask=every_v < V, other=0.0)
                z_whole, weight = _beside(z, norm_weight, t, z_t, every_v, live, V, GATE)
                whole = _normed(whole, live, z_whole, weight, norm_eps, V, GATE)
                tl.store(
                    o + t.to(tl.int64) * (HV * V) + every_v,
                    narrow(whole, o.dtype.element_ty),
                    mask=every_v < V,
                )
