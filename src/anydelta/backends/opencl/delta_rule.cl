// The gated delta rule, GDA and KDA. One work-group advances a panel of columns of one state through all its tokens.
//
//     S   = diag(a_t) S                 a_t = exp(g_t): one number (GDA) or a vector over K (KDA)
//     d_t = beta_t (v_t - S^T k_t)
//     S   = S + k_t d_t^T
//     o_t = scale * S^T q_t
//
//     q, k [B, T, H, K]   v, o [B, T, HV, V]   g [B, T, HV] or [B, T, HV, K]   beta [B, T, HV]
//     state [N or P, HV, K, V]   snapshots [Ks, N, HV, K, V]   mask [B, T]   cu_seqlens [N+1]   state_indices [N]
//
// Everything is computed in float32; types are converted where memory is read and written. All strides are run-time
// values in elements, so a [V, K] state or a slice of a wider tensor only has other strides.
//
// Columns of S are independent: o_t[v] and S[:, v] depend on no other column. So a work-item keeps NVEC vectors of
// VEC columns in registers over all tokens, with K / LANES rows of each. LANES work-items share a column: row i
// belongs to lane i % LANES, and they communicate only in the sums over K. These sums read the state before the
// update, so the two sums of a token need one exchange:
//
//     p = S^T (a k)    r = S^T (a q)    d = beta (v - p)    o = scale (r + (k . q) d)    S = a S + k d
//
// Values that all columns need (k, q, a, beta, and v in float32) are staged in local memory for
// BLOCK tokens at a time.
//
// The host sets (backends/opencl/device.py gives the reasons for its choices):
//     KP     rows of the kernel, a multiple of 16; those above K hold zeros
//     KDA    0 or 1          VEC    1, 2, 4, 8 or 16        NVEC   vectors of columns per work-item
//     LANES  a power of two  WG     work-items per group     BLOCK  tokens per stage
//     MEET   how LANES work-items add up: 0 there is only one, 1 local memory, 2 sub-groups
//     SG     the pinned size of sub-groups, 0 if it cannot be pinned
//     UNROLL rows per iteration of the loops over the state: all of them if it must stay in registers
//     ENTRY  0 by_address, 1 by_buffer        CALLS  defined: memory access as calls, which CPU drivers build faster

#if MEET == 2
#ifdef cl_khr_subgroup_shuffle
#pragma OPENCL EXTENSION cl_khr_subgroup_shuffle : enable
#define SHUFFLE_XOR(x, mask) sub_group_shuffle_xor(x, mask)
#else
#pragma OPENCL EXTENSION cl_intel_subgroups : enable
#define SHUFFLE_XOR(x, mask) intel_sub_group_shuffle_xor(x, mask)
#endif
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if VEC == 1
typedef float F;
typedef uint U;
#define AS_F as_float
#define AS_U as_uint
#define TO_U convert_uint
#define TO_USHORT convert_ushort
#define LOAD_F(p) (*(p))
#define STORE_F(x, p) (*(p) = (x))
#define LOAD_USHORT(p) (*(p))
#define STORE_USHORT(x, p) (*(p) = (x))
#define LOAD_HALF(p) vload_half(0, p)
#define STORE_HALF(x, p) vstore_half_rte(x, 0, p)
#else
typedef JOIN(float, VEC) F;
typedef JOIN(uint, VEC) U;
#define AS_F JOIN(as_float, VEC)
#define AS_U JOIN(as_uint, VEC)
#define TO_U JOIN(convert_uint, VEC)
#define TO_USHORT JOIN(convert_ushort, VEC)
#define LOAD_F(p) JOIN(vload, VEC)(0, p)
#define STORE_F(x, p) JOIN(vstore, VEC)(x, 0, p)
#define LOAD_USHORT(p) JOIN(vload, VEC)(0, p)
#define STORE_USHORT(x, p) JOIN(vstore, VEC)(x, 0, p)
#define LOAD_HALF(p) JOIN(vload_half, VEC)(0, p)
#define STORE_HALF(x, p) JOIN(JOIN(vstore_half, VEC), _rte)(x, 0, p)
#endif

#ifdef CALLS
#define OUTLINED __attribute__((noinline))
#else
#define OUTLINED
#endif

#ifdef FP_FAST_FMAF
#define FMA fma
#else
#define FMA mad
#endif

#define ROWS (KP / LANES)
#define COLS (WG / LANES * VEC * NVEC)  // of a work-group
#define CHUNKS (KP / VEC)

enum { F32, BF16, F16 };                       // Params.*_type
enum { DECAY_LOG, DECAY_LINEAR, DECAY_RAW };   // Params.decay
enum { Q, K, V, G, BETA, STATE_IN, A_LOG, DT_BIAS, MASK, CU, INDICES, O, STATE_OUT, SNAPSHOTS, ARRAYS };

// Packed by the host: PARAMS are the members of devices/structs.py. Strides in elements, outermost axis first.
typedef struct {
  ulong at[ARRAYS];  // address (entry by_address) or byte offset in its buffer (by_buffer); ~0 for an absent array
  PARAMS
} Params;

#define ABSENT (~0UL)
#define HAS(array) (P->at[array] != ABSENT)

typedef struct {
  global uchar* at[ARRAYS];
} Arrays;

// VEC elements from `stride` apart, of which the first n exist; the others read as 0.
OUTLINED F load(const global uchar* base, int type, long offset, long stride, int n) {
  if (stride == 1 && n >= VEC) {
    if (type == F32) return LOAD_F((const global float*)base + offset);
    if (type == BF16) return AS_F(TO_U(LOAD_USHORT((const global ushort*)base + offset)) << 16);
    return LOAD_HALF((const global half*)base + offset);
  }
  float x[VEC];
  for (int i = 0; i < VEC; ++i) {
    long at = offset + i * stride;
    x[i] = i >= n         ? 0.0f
           : type == F32  ? ((const global float*)base)[at]
           : type == BF16 ? as_float((uint)((const global ushort*)base)[at] << 16)
                          : vload_half(at, (const global half*)base);
  }
  return *(F*)x;
}

OUTLINED float load_one(const global uchar* base, int type, long at) {
  return type == F32    ? ((const global float*)base)[at]
         : type == BF16 ? as_float((uint)((const global ushort*)base)[at] << 16)
                        : vload_half(at, (const global half*)base);
}

OUTLINED ushort to_bf16(float x) {  // to nearest, ties to even
  uint u = as_uint(x);
  return isnan(x) ? 0x7FC0 : (ushort)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

OUTLINED void store(F x, global uchar* base, int type, long offset, long stride, int n) {
  if (stride == 1 && n >= VEC) {
    if (type == F32)
      STORE_F(x, (global float*)base + offset);
    else if (type == BF16) {
      U u = AS_U(x);
      U rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
      STORE_USHORT(TO_USHORT(select(rounded, (U)0x7FC0, isnan(x))), (global ushort*)base + offset);
    } else
      STORE_HALF(x, (global half*)base + offset);
    return;
  }
  for (int i = 0; i < VEC && i < n; ++i) {
    float one = ((float*)&x)[i];
    long at = offset + i * stride;
    if (type == F32)
      ((global float*)base)[at] = one;
    else if (type == BF16)
      ((global ushort*)base)[at] = to_bf16(one);
    else
      vstore_half_rte(one, at, (global half*)base);
  }
}

float total(F x) {
  float sum = 0.0f;
  for (int i = 0; i < VEC; ++i) sum += ((float*)&x)[i];
  return sum;
}

// e = exp(-|x|) <= 1, and no cancellation on either side
OUTLINED F sigmoid(F x) {
  F e = exp(-fabs(x));
  return select(e, (F)1.0f, isgreaterequal(x, (F)0.0f)) / (1.0f + e);
}

// exp(log decay), in [0, 1].   raw: log decay = -exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) (..))
OUTLINED F decay_of(const Params* P, F g, F dt_bias, float a_log) {
  if (P->decay == DECAY_LINEAR) return g;
  if (P->decay == DECAY_LOG) return exp(g);
  F x = g + dt_bias;
  float A = exp(a_log);
  if (P->has_lower_bound) return exp(P->lower_bound * sigmoid(A * x));
  return exp(-A * (fmax(x, 0.0f) + log1p(exp(-fabs(x)))));
}

// The factor of x if its sum of squares is outside float32's range; 1 inside, and for NaN.
float unit_for(float sum) {
  return sum < 0x1p-90f ? 0x1p55f : sum > 0x1p120f ? 0x1p-55f : 1.0f;
}

// Sum of x over the LANES work-items that share a column; each of them gets it.
// Local memory: two scratch areas alternate, so that one barrier per sum suffices.
F meet(F x, int slot, local F* scratch, int* turn) {
#if MEET == 2
  for (int mask = 1; mask < LANES; mask *= 2)
#if VEC == 1
    x += SHUFFLE_XOR(x, mask);
#else
    for (int i = 0; i < VEC; ++i) ((float*)&x)[i] += SHUFFLE_XOR(((float*)&x)[i], mask);
#endif
#elif MEET == 1
  local F* mine = scratch + (*turn) * WG;
  *turn ^= 1;
  mine[slot] = x;
  barrier(CLK_LOCAL_MEM_FENCE);
  x = 0.0f;
  for (int i = 0; i < LANES; ++i) x += mine[slot / LANES * LANES + i];
#endif
  return x;
}

// The work-item's part of a state [K, V] whose strides are st[0], st[1]. The first branch is for the usual float32
// states with whole vectors of neighbouring columns.
void read_state(const Params* P, F S[ROWS][NVEC], const global uchar* base, long at, const long* st, int lane, int first) {
  if (P->state_type == F32 && st[1] == 1 && first + NVEC * VEC <= P->V) {
    const global float* s = (const global float*)base + at + first + lane * st[0];
#pragma unroll UNROLL
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NVEC; ++j)
        S[i][j] = i * LANES + lane < P->k_rows ? LOAD_F(s + i * LANES * st[0] + j * VEC) : (F)0.0f;
    return;
  }
#pragma unroll UNROLL
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < NVEC; ++j) {
      const int k = i * LANES + lane, c = first + j * VEC;
      S[i][j] = 0.0f;
      if (k < P->k_rows && c < P->V) S[i][j] = load(base, P->state_type, at + k * st[0] + c * st[1], st[1], P->V - c);
    }
}

void write_state(const Params* P, F S[ROWS][NVEC], global uchar* base, long at, const long* st, int lane, int first) {
  if (P->state_type == F32 && st[1] == 1 && first + NVEC * VEC <= P->V) {
    global float* s = (global float*)base + at + first + lane * st[0];
#pragma unroll UNROLL
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NVEC; ++j)
        if (i * LANES + lane < P->k_rows) STORE_F(S[i][j], s + i * LANES * st[0] + j * VEC);
    return;
  }
#pragma unroll UNROLL
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < NVEC; ++j) {
      const int k = i * LANES + lane, c = first + j * VEC;
      if (k < P->k_rows && c < P->V) store(S[i][j], base, P->state_type, at + k * st[0] + c * st[1], st[1], P->V - c);
    }
}

#if MEET == 1
#define SCRATCH (2 * WG)
#else
#define SCRATCH 1
#endif

void advance(const Params* P, const Arrays* A, local float* sk, local float* sq, local float* sa, local float* sv,
             local float4* token, local float4* sums, local F* scratch, local int* odd) {
  // slot: the work-item's place in its group, neighbours in a sub-group next to each other
#if MEET == 2
  const int slot = get_sub_group_id() * get_max_sub_group_size() + get_sub_group_local_id();
#else
  const int slot = get_local_id(0);
#endif
  const int lane = slot % LANES;
  int turn = 0;

  // group -> (panel of columns, value head, sequence)
  const int panels = (P->V + COLS - 1) / COLS;
  const int panel = get_group_id(0) % panels;
  const int h = get_group_id(0) / panels % P->HV;
  const long n = get_group_id(0) / panels / P->HV;
  const int hq = P->tiled ? h % P->H : h / (P->HV / P->H);
  const int first = panel * COLS + slot / LANES * (VEC * NVEC);  // my first column

  long b = n, start = 0, end = P->T;
  if (HAS(CU)) {
    const global uchar* cu = A->at[CU];
    b = 0;
    const long from = n * P->cu, to = (n + 1) * P->cu;
    start = P->cu64 ? ((const global long*)cu)[from] : ((const global int*)cu)[from];
    end = P->cu64 ? ((const global long*)cu)[to] : ((const global int*)cu)[to];
  }
  long row = n;
  if (HAS(INDICES)) {
    const global uchar* indices = A->at[INDICES];
    const long at = n * P->indices;
    row = P->indices64 ? ((const global long*)indices)[at] : ((const global int*)indices)[at];
  }
  const long out_row = P->out_dense ? n : row;
  global uchar* const o = A->at[O];
  const long o_head = b * P->o[0] + h * P->o[2];

  // S [ROWS][NVEC * VEC]: my rows lane, lane + LANES, ... of my columns
  F S[ROWS][NVEC];
  if (HAS(STATE_IN) && row >= 0)
    read_state(P, S, A->at[STATE_IN], row * P->state_in[0] + h * P->state_in[1], P->state_in + 2, lane, first);
  else
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NVEC; ++j) S[i][j] = 0.0f;

  if (row < 0) {  // a skipped sequence: zeros out
    for (long t = start; t < end; ++t)
      for (int j = 0; j < NVEC; ++j)
        if (lane == 0 && first + j * VEC < P->V)
          store((F)0.0f, o, P->qkv_type, o_head + t * P->o[1] + (first + j * VEC) * P->o[3], P->o[3],
                P->V - first - j * VEC);
    end = start;
  }

  const float a_log = HAS(A_LOG) ? load_one(A->at[A_LOG], P->a_log_type, h * P->a_log) : 0.0f;

  for (long t0 = start; t0 < end; t0 += BLOCK) {
    const int live = (int)min((long)BLOCK, end - t0);  // tokens of this stage

    // ---- stage: k, q [BLOCK][KP], v [BLOCK][COLS], a [BLOCK][KP] (KDA), token = (a, beta, is live, -)
    barrier(CLK_LOCAL_MEM_FENCE);
    if (slot == 0) *odd = 0;
    for (int x = slot; x < live * CHUNKS; x += WG) {
      const long t = t0 + x / CHUNKS;
      const int i = x % CHUNKS * VEC;
      const long at_q = b * P->q[0] + t * P->q[1] + hq * P->q[2] + i * P->q[3];
      const long at_k = b * P->k[0] + t * P->k[1] + hq * P->k[2] + i * P->k[3];
      STORE_F(load(A->at[Q], P->qkv_type, at_q, P->q[3], P->k_rows - i), sq + x * VEC);
      STORE_F(load(A->at[K], P->qkv_type, at_k, P->k[3], P->k_rows - i), sk + x * VEC);
#if KDA
      const long at_g = b * P->g[0] + t * P->g[1] + h * P->g[2] + i * P->g[3];
      F bias = 0.0f;
      if (HAS(DT_BIAS))
        bias = load(A->at[DT_BIAS], P->dt_bias_type, h * P->dt_bias[0] + i * P->dt_bias[1], P->dt_bias[1], P->k_rows - i);
      STORE_F(decay_of(P, load(A->at[G], P->g_type, at_g, P->g[3], P->k_rows - i), bias, a_log), sa + x * VEC);
#endif
    }
    for (int x = slot; x < live * (COLS / VEC); x += WG) {
      const long t = t0 + x / (COLS / VEC);
      const int c = panel * COLS + x % (COLS / VEC) * VEC;
      const long at_v = b * P->v[0] + t * P->v[1] + h * P->v[2] + c * P->v[3];
      STORE_F(load(A->at[V], P->qkv_type, at_v, P->v[3], P->V - c), sv + x * VEC);
    }
    for (int x = slot; x < live; x += WG) {
      const long t = t0 + x;
      float4 s;
      s.x = 1.0f;
#if !KDA
      F bias = HAS(DT_BIAS) ? (F)load_one(A->at[DT_BIAS], P->dt_bias_type, h * P->dt_bias[0]) : (F)0.0f;
      F g = load_one(A->at[G], P->g_type, b * P->g[0] + t * P->g[1] + h * P->g[2]);
      F a = decay_of(P, g, bias, a_log);
      s.x = ((float*)&a)[0];
#endif
      F beta = load_one(A->at[BETA], P->beta_type, b * P->beta[0] + t * P->beta[1] + h * P->beta[2]);
      if (P->logit) beta = sigmoid(beta);
      s.y = ((float*)&beta)[0];
      s.z = !HAS(MASK) || A->at[MASK][b * P->mask[0] + t * P->mask[1]] ? 1.0f : 0.0f;
      s.w = 0.0f;
      token[x] = s;
    }
    barrier(CLK_LOCAL_MEM_FENCE);

    // ---- sums over K: q.q, k.k, k.q; each column's lanes take a token at a time. If a sum of squares leaves float32's
    // range, all sums are repeated on rows scaled by a power of two: sums = factors of q and k, q.q, k.k
    for (int again = 0; again < 2; ++again) {
      for (int x = 0; x < live; x += WG / LANES) {
        const int mine = x + slot / LANES;
        const float uq = again && mine < live ? unit_for(sums[mine].z) : 1.0f;
        const float uk = again && mine < live ? unit_for(sums[mine].w) : 1.0f;
        F qq = 0.0f, kk = 0.0f, kq = 0.0f;
        if (mine < live)
          for (int i = lane; i < CHUNKS; i += LANES) {
            F q = LOAD_F(sq + mine * KP + i * VEC), k = LOAD_F(sk + mine * KP + i * VEC);
            if (again) {
              q *= uq, k *= uk;
              STORE_F(q, sq + mine * KP + i * VEC);
              STORE_F(k, sk + mine * KP + i * VEC);
            }
            kq = FMA(k, q, kq);
            if (P->l2norm) qq = FMA(q, q, qq), kk = FMA(k, k, kk);
          }
        kq = meet(kq, slot, scratch, &turn);
        float4 found = (float4)(P->scale, 1.0f, 1.0f, 1.0f);
        if (P->l2norm) {  // x rsqrt(sum x^2 + eps), 0 for 0
          qq = meet(qq, slot, scratch, &turn);
          kk = meet(kk, slot, scratch, &turn);
          found.z = total(qq) + P->eps * uq * uq;
          found.w = total(kk) + P->eps * uk * uk;
          found.x *= found.z == 0.0f ? 0.0f : rsqrt(found.z);
          found.y = found.w == 0.0f ? 0.0f : rsqrt(found.w);
        }
        if (mine < live && lane == 0) {
          token[mine].w = total(kq) * found.x * found.y;
          sums[mine] = found;
          if (unit_for(found.z) != 1.0f || unit_for(found.w) != 1.0f) *odd = 1;
        }
      }
      barrier(CLK_LOCAL_MEM_FENCE);
      if (!*odd) break;
    }

    // ---- the recurrence
    for (int x = 0; x < live; ++x) {
      const long t = t0 + x;
      const float4 s = token[x];
      F out[NVEC];
      for (int j = 0; j < NVEC; ++j) out[j] = 0.0f;
      if (s.z != 0.0f) {
        const float fq = sums[x].x, fk = sums[x].y;
        const local float *k = sk + x * KP + lane, *q = sq + x * KP + lane;
#if KDA
        const local float* a = sa + x * KP + lane;
#endif
        // p = sum_K S a k,  r = sum_K S a q
        F p[NVEC], r[NVEC];
        for (int j = 0; j < NVEC; ++j) p[j] = r[j] = 0.0f;
#pragma unroll UNROLL
        for (int i = 0; i < ROWS; ++i) {
#if KDA
          const float ak = a[i * LANES] * k[i * LANES], aq = a[i * LANES] * q[i * LANES];
#else
          const float ak = k[i * LANES], aq = q[i * LANES];
#endif
          for (int j = 0; j < NVEC; ++j) {
            p[j] = FMA(S[i][j], (F)ak, p[j]);
            r[j] = FMA(S[i][j], (F)aq, r[j]);
          }
        }
        F d[NVEC];
        for (int j = 0; j < NVEC; ++j) {
          p[j] = meet(p[j], slot, scratch, &turn);
          r[j] = meet(r[j], slot, scratch, &turn);
          // d = beta (v - S^T k),  o = scale S^T q + (k . q) d
          const F v = LOAD_F(sv + x * COLS + slot / LANES * (VEC * NVEC) + j * VEC);
          d[j] = s.y * (v - s.x * fk * p[j]);
          out[j] = FMA((F)s.w, d[j], s.x * fq * r[j]);
          d[j] *= fk;
        }
        // S = a S + k d
#pragma unroll UNROLL
        for (int i = 0; i < ROWS; ++i) {
#if KDA
          const F decay = a[i * LANES];
#else
          const F decay = s.x;
#endif
          for (int j = 0; j < NVEC; ++j) S[i][j] = FMA((F)k[i * LANES], d[j], decay * S[i][j]);
        }
      }
      if (lane == 0)
        for (int j = 0; j < NVEC; ++j) {
          const int c = first + j * VEC;
          if (c < P->V) store(out[j], o, P->qkv_type, o_head + t * P->o[1] + c * P->o[3], P->o[3], P->V - c);
        }
      // slot s of the snapshots: the state of s tokens before the last
      if (end - 1 - t < P->Ks) {
        const long to = (end - 1 - t) * P->snapshots[0] + n * P->snapshots[1] + h * P->snapshots[2];
        write_state(P, S, A->at[SNAPSHOTS], to, P->snapshots + 3, lane, first);
      }
    }
  }

  if (HAS(STATE_OUT) && out_row >= 0)
    write_state(P, S, A->at[STATE_OUT], out_row * P->state_out[0] + h * P->state_out[1], P->state_out + 2, lane, first);
}

#define LOCALS                                                                    \
  local float sk[BLOCK * KP], sq[BLOCK * KP], sa[KDA ? BLOCK * KP : 1];           \
  local float sv[BLOCK * COLS];                                                   \
  local float4 token[BLOCK];                                                      \
  local float4 sums[BLOCK];                                                       \
  local F scratch[SCRATCH];                                                       \
  local int odd;
#if SG
#define PINNED __attribute__((intel_reqd_sub_group_size(SG)))
#else
#define PINNED
#endif

#if ENTRY == 0
// Arrays by address: for devices that see the host's memory (fine-grain system SVM, USM).
__attribute__((reqd_work_group_size(WG, 1, 1))) PINNED kernel void by_address(const Params params) {
  LOCALS
  Arrays A;
  for (int i = 0; i < ARRAYS; ++i) A.at[i] = (global uchar*)params.at[i];
  advance(&params, &A, sk, sq, sa, sv, token, sums, scratch, &odd);
}

#else
// Arrays as buffers and offsets. An absent array has any buffer.
__attribute__((reqd_work_group_size(WG, 1, 1))) PINNED kernel void by_buffer(
    const Params params, const global uchar* q, const global uchar* k, const global uchar* v, const global uchar* g,
    const global uchar* beta, const global uchar* state_in, const global uchar* a_log, const global uchar* dt_bias,
    const global uchar* mask, const global uchar* cu, const global uchar* indices, global uchar* o,
    global uchar* state_out, global uchar* snapshots) {
  LOCALS
  Arrays A;
  const global uchar* const at[ARRAYS] = {q,       k,    v,  g,       beta, state_in,  a_log,
                                          dt_bias, mask, cu, indices, o,    state_out, snapshots};
  for (int i = 0; i < ARRAYS; ++i) A.at[i] = (global uchar*)at[i] + (params.at[i] == ABSENT ? 0 : params.at[i]);
  advance(&params, &A, sk, sq, sa, sv, token, sums, scratch, &odd);
}
#endif
