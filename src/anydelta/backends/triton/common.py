"""Shared by the Triton kernels: a program's tokens, gates in every form, products of split numbers.

Everything here is inlined into the kernels. Accumulation is in float32 throughout.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton 3.9's interpreter truncates conversions to bfloat16, slowly, and in a dot it multiplies the bit patterns of
# bfloat16 operands. So under the interpreter conversions work on bits and round to nearest even, like GPUs. Operands of
# products stay float32 with bfloat16 values, whose products are exact in float32.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def widen(x):
    """x as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x as dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = _rounded_bits(x) >> 16
        y = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def _rounded_bits(x):
    bits = x.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000


@triton.jit
def tokens_of(n, cu_seqlens, T):
    """(row of the batch, first token, end) of sequence n."""
    row = n.to(tl.int64)
    start = n * 0
    end = start + T
    if cu_seqlens is not None:
        row = row * 0
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    return row, start, end


@triton.jit
def qk_head(hv, H: tl.constexpr, HV: tl.constexpr, TILED: tl.constexpr):
    """The query/key head of value head hv."""
    if TILED:
        head = hv % H
    else:
        head = hv // (HV // H)
    return head


@triton.jit
def log_decay(g, A, bias, lower_bound, DECAY: tl.constexpr, BOUNDED: tl.constexpr):
    """log(decay) <= 0 in float32, from a gate in any form; A = exp(A_log). -inf and NaN pass through."""
    g = widen(g)
    if DECAY == "linear":
        g = tl.log(g)
    elif DECAY == "raw":
        x = g + bias
        if BOUNDED:
            # lower_bound * sigmoid(A x)
            g = lower_bound / (1.0 + tl.exp(-A * x))
        else:
            # -A softplus(x), softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|) in (0, 1].
            # Where 1 + e rounds, log(u) * e / (u - 1) corrects for it (Kahan); e alone where u is 1.
            e = tl.exp(-tl.abs(x))
            u = 1.0 + e
            tail = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
            g = -A * (tl.where(x > 0, x, 0.0) + tail)
    return g


@triton.jit
def write_strength(beta, LOGIT: tl.constexpr):
    """beta in float32, after the sigmoid."""
    beta = widen(beta)
    if LOGIT:
        beta = 1.0 / (1.0 + tl.exp(-beta))
    return beta


SMALL = tl.constexpr(2.0**-55)
LARGE = tl.constexpr(2.0**55)


@triton.jit
def inverse_length(small, large, eps):
    """rsqrt(sum x^2 + eps), 0 for 0, from the sums of (SMALL x)^2 and (LARGE x)^2: one is in float32's range."""
    small += eps * (SMALL * SMALL)
    large += eps * (LARGE * LARGE)
    big = small > 2.0**-98
    total = tl.where(big, small, large)
    r = tl.where(big, SMALL, LARGE) * tl.rsqrt(tl.where(total == 0, 1.0, total))
    return tl.where(total == 0, 0.0, r)


@triton.jit
def squares(x, unit: tl.constexpr):
    """(unit x)^2."""
    return (x * unit) * (x * unit)


@triton.jit
def gate_of(z, SIGMOID: tl.constexpr):
    """silu(z) or sigmoid(z)."""
    s = 1.0 / (1.0 + tl.exp(-z))
    return s if SIGMOID else z * s


@triton.jit
def split(x):
    """x as high + low, two bfloat16 numbers: 16 bits of mantissa in all, and float32's exponents.

    One bfloat16 factor is off by up to 2^-9, which alone violates NMSE <= 1e-7 for a float32 state. A split one is off
    by 2^-18. (tf32 truncates at 2^-11 and takes twice the time of a bfloat16 product.)
    """
    if INTERPRETED:
        high = _rounded_bits(x).to(tl.float32, bitcast=True)
        low = _rounded_bits(x - high).to(tl.float32, bitcast=True)
    else:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def mma(a, b, acc):
    """acc + a b on tensor cores. a [M, K], b [K, N] bfloat16; acc [M, N] float32."""
    if INTERPRETED:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def product(a_high, a_low, b_high, b_low, acc, A_EXACT: tl.constexpr, B_EXACT: tl.constexpr):
    """acc + a b. An EXACT factor has only a high part. Small terms first."""
    if not B_EXACT:
        acc = mma(a_high, b_low, acc)
    if not A_EXACT:
        acc = mma(a_low, b_high, acc)
    return mma(a_high, b_high, acc)
