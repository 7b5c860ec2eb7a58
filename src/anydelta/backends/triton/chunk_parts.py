"""Shared by the kernels of chunks: a chunk's place, its rows and decays, the inverse of a triangular matrix.

Everything here is inlined into the kernels of chunk.py and chunk_backward.py.
"""

import triton
import triton.language as tl

from .common import LARGE, SMALL, inverse_length, log_decay, narrow, product, split, squares, tokens_of, widen

FACTORS = tl.constexpr(5)
"""Rows of `factors` for each chunk and head: see chunk.prepare."""


@triton.jit
def chunk_at(slot, cu_seqlens, N, T, Ks, C: tl.constexpr, TAIL: tl.constexpr):
    """(sequence, row of the batch, first token of the chunk, end of the sequence) of a slot.

    Row b has the slots from b * ceil(T / C) on. Packed sequence n has those from cu_seqlens[n] // C + n on: enough for
    all its chunks, without a table that the host would have to wait for.
    """
    if cu_seqlens is None:
        per_row = tl.cdiv(T, C)
        n = slot // per_row
        first = n * per_row
    else:
        n = 0
        last = N - 1
        while n < last:
            middle = (n + last + 1) // 2
            if tl.load(cu_seqlens + middle).to(tl.int32) // C + middle <= slot:
                n = middle
            else:
                last = middle - 1
        first = tl.load(cu_seqlens + n).to(tl.int32) // C + n
    row, start, end = tokens_of(n, cu_seqlens, T)
    if TAIL:
        end = tl.maximum(start, end - Ks)
    return n, row, start + (slot - first) * C, end


@triton.jit
def chunk_of(pid, cu_seqlens, state_indices, N, T, Ks, HV: tl.constexpr, C: tl.constexpr, TAIL: tl.constexpr):
    """(slot, value head, row of the batch, first token, end) for a program per chunk and head.

    If there is nothing to do (an unused slot, a skipped sequence), the end is not after the first token.
    """
    hv = pid % HV
    slot = pid // HV
    n, b, start, end = chunk_at(slot, cu_seqlens, N, T, Ks, C, TAIL)
    if state_indices is not None:
        end = tl.where(tl.load(state_indices + n) < 0, start, end)
    return slot, hv, b, start, end


@triton.jit
def first_slot(n, cu_seqlens, T, C: tl.constexpr):
    """The slot of the first chunk of sequence n."""
    if cu_seqlens is None:
        slot = n * tl.cdiv(T, C)
    else:
        slot = tl.load(cu_seqlens + n).to(tl.int32) // C + n
    return slot


@triton.jit
def alive(mask, mask_t, t, end):
    """[C]: the tokens that count."""
    live = t < end
    if mask is not None:
        live = tl.load(mask + t.to(tl.int64) * mask_t, mask=live, other=0) != 0
    return live


@triton.jit
def rows(x, x_t, t, live, i, inside):
    """[C, BD] rows of x at tokens t; zeros for tokens that do not count."""
    at = t.to(tl.int64)[:, None] * x_t + i[None, :]
    return tl.load(x + at, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def inverse_lengths(x, eps):
    """[C]: rsqrt(sum x^2 + eps), 0 for a row of zeros."""
    x = widen(x)
    return inverse_length(tl.sum(squares(x, SMALL), 1), tl.sum(squares(x, LARGE), 1), eps)


@triton.jit
def normed(x, x_t, t, live, i, inside, eps, L2NORM: tl.constexpr):
    """As `rows`, in float32 and of length 1 if L2NORM: x * rsqrt(sum x^2 + eps)."""
    out = widen(rows(x, x_t, t, live, i, inside))
    if L2NORM:
        out *= inverse_lengths(out, eps)[:, None]
    return out


@triton.jit
def gate_row(g, g_t, t, live, A, bias, lower_bound, DECAY: tl.constexpr, BOUNDED: tl.constexpr):
    """[C] log decays of GDA; 0 for tokens that do not count."""
    gate = tl.load(g + t.to(tl.int64) * g_t, mask=live, other=0.0)
    return tl.where(live, log_decay(gate, A, bias, lower_bound, DECAY, BOUNDED), 0.0)


@triton.jit
def gate_rows(g, g_t, t, live, i_k, in_k, A, bias, lower_bound, DECAY: tl.constexpr, BOUNDED: tl.constexpr):
    """[C, BK] log decays of KDA; 0 for tokens that do not count."""
    gate = rows(g, g_t, t, live, i_k, in_k)
    gate = log_decay(gate, A, bias[None, :], lower_bound, DECAY, BOUNDED)
    return tl.where(live[:, None] & in_k[None, :], gate, 0.0)


@triton.jit
def gate_parameters(A_log, dt_bias, hv, i_k, in_k, K: tl.constexpr, KDA: tl.constexpr, DECAY: tl.constexpr):
    """(exp(A_log), bias): scalars, except that bias is [BK] for KDA."""
    A = 1.0
    bias = 0.0
    if KDA:
        bias = tl.zeros(i_k.shape, tl.float32)
    if DECAY == "raw":
        if A_log is not None:
            A = tl.exp(widen(tl.load(A_log + hv)))
        if dt_bias is not None:
            if KDA:
                bias = widen(tl.load(dt_bias + hv * K + i_k, mask=in_k, other=0.0))
            else:
                bias = widen(tl.load(dt_bias + hv))
    return A, bias


@triton.jit
def chunk_decays(
    g, g_t, mask, mask_t, t, end, i_k, in_k, A, bias, lower_bound, C: tl.constexpr, KDA: tl.constexpr,
    DECAY: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """(log decays g_i, E_i = exp(g_1 + ... + g_i), e(i, C), E_C) of a chunk: [C], E_C a number; KDA: [C, BK], [BK]."""
    live = alive(mask, mask_t, t, end)
    # e(i, C) from sums that begin after i; a difference of two sums would fail beside -inf
    following = alive(mask, mask_t, t + 1, end) & (tl.arange(0, C) < C - 1)
    if KDA:
        gate = gate_rows(g, g_t, t, live, i_k, in_k, A, bias, lower_bound, DECAY, BOUNDED)
        after = gate_rows(g, g_t, t + 1, following, i_k, in_k, A, bias, lower_bound, DECAY, BOUNDED)
    else:
        gate = gate_row(g, g_t, t, live, A, bias, lower_bound, DECAY, BOUNDED)
        after = gate_row(g, g_t, t + 1, following, A, bias, lower_bound, DECAY, BOUNDED)
    return (
        gate,
        tl.exp(tl.cumsum(gate, 0)),
        tl.exp(tl.cumsum(after, 0, reverse=True)),
        tl.exp(tl.sum(gate, 0)),
    )


@triton.jit
def pair_decays(gate, C: tl.constexpr):
    """e(j, i) [C, C] of GDA from log decays [C]: exp(sum of g_l over j < l <= i); 1 where i <= j."""
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    return tl.exp(tl.cumsum(tl.where(below, gate[:, None], 0.0), 0))


@triton.jit
def parts(x, EXACT: tl.constexpr):
    """x as (high, low) in bfloat16; the low part of an EXACT one is not used."""
    if EXACT:
        high = x
        low = x
    else:
        high, low = split(widen(x))
    return high, low


@triton.jit
def multiply(a, b):
    """a b for float32 matrices."""
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    zero = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    return product(a_high, a_low, b_high, b_low, zero, False, False)


@triton.jit
def inverse(A, C: tl.constexpr):
    """(I + A)^-1 for A [C, C] strictly lower triangular, C = 16, 32 or 64.

    The diagonal blocks of 16 by forward substitution, all at once: row s of the inverse is e_s - A[s, :] inverse. With
    D their inverses and N = D (A - diagonal blocks), N^(C/16) = 0, and the rest is three products. (Squaring all the
    way is even shorter, but powers of A grow like binomials and cancel.)
    """
    NB: tl.constexpr = C // 16
    i = tl.arange(0, C)
    r = tl.arange(0, 16)
    same = (i[:, None] // 16) == (i[None, :] // 16)
    inside = tl.reshape(tl.where(same, A, 0.0), [NB, 16, NB, 16])
    X = -tl.sum(inside, 2)  # [NB, 16, 16]
    for s in range(1, 16):
        row = tl.sum(tl.where(r[None, :, None] == s, X, 0.0), 1)  # [NB, 16] = -A[s, :]
        row += tl.sum(row[:, :, None] * X, 1)
        X = tl.where(r[None, :, None] == s, row[:, None, :], X)
    X += tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    spread = tl.broadcast_to(tl.reshape(X, [NB, 16, 1, 16]), [NB, 16, NB, 16])
    D = tl.where(same, tl.reshape(spread, [C, C]), 0.0)
    if NB > 1:
        N = multiply(D, tl.where(same, 0.0, A))
        # (I + N)^-1 D = (I - N)(I + N^2) D
        if NB > 2:
            D += multiply(multiply(N, N), D)
        D -= multiply(N, D)
    return D


@triton.jit
def store_split(at, x, distance: tl.constexpr, inside):
    """The high part of x at `at`, the low one `distance` further."""
    high, low = split(x)
    tl.store(at, narrow(high, tl.bfloat16), mask=inside)
    tl.store(at + distance, narrow(low, tl.bfloat16), mask=inside)
