// The rest of a model: norms, routers, top-k, rows of a packed embedding table, linears with float32 weights.
#ifndef MOQC_DENSE
#define MOQC_DENSE

namespace moqc {

// The sum over the block; `room` has 32 floats.
__device__ __forceinline__ float block_sum(float value, float* room) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(0xffffffffu, value, i);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
  for (int i = 0; i < blockDim.x / 32; ++i) value += room[i];
  return value;
}

// y = x * rsqrt(mean(x^2) + epsilon) (* weight); a block a row. ADDED: of x + added, which goes to `total`.
template <int COLUMNS_, bool WEIGHTED, bool ADDED>
__device__ __forceinline__ void rms_norm(const float* x, const float* added, const float* weight, float epsilon, float* total, float* y) {
  constexpr int THREADS = COLUMNS_ / 4 < 32 ? 32 : COLUMNS_ / 4 > 1024 ? 1024 : COLUMNS_ / 4 / 32 * 32, EACH = (COLUMNS_ + THREADS - 1) / THREADS;
  __shared__ float room[32];
  start_next_kernel();
  wait_for_previous_kernel();
  const long long row = (long long)blockIdx.x * COLUMNS_;
  float values[EACH], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * THREADS + threadIdx.x;
    values[i] = COLUMNS_ % THREADS == 0 || at < COLUMNS_ ? x[row + at] + (ADDED ? added[row + at] : 0.0f) : 0.0f;
    sum = fmaf(values[i], values[i], sum);
  }
  const float factor = rsqrtf(block_sum(sum, room) / COLUMNS_ + epsilon);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * THREADS + threadIdx.x;
    if (COLUMNS_ % THREADS != 0 && at >= COLUMNS_) continue;
    if (ADDED) total[row + at] = values[i];
    y[row + at] = values[i] * factor * (WEIGHTED ? weight[at] : 1.0f);
  }
}

// y[token][N] = x W' with float32 W [N][K]. A warp takes ROWS_ rows of W and up to 8 tokens; grid: blocks of 4 warps over
// rows, then tokens.
template <int N, int K, int ROWS_> __device__ __forceinline__ void linear_dense(const float* x, int tokens, const float* w, float* y) {
  constexpr int BLOCKS = (N + 4 * ROWS_ - 1) / (4 * ROWS_);
  const int lane = threadIdx.x % 32, first = (blockIdx.x % BLOCKS * 4 + threadIdx.x / 32) * ROWS_, token = blockIdx.x / BLOCKS * 8;
  start_next_kernel();
  wait_for_previous_kernel();
  const int count = min(tokens - token, 8);
  float acc[ROWS_][8] = {};
  if (first >= N) return;
  if (count == 1) {
#pragma unroll 8
    for (int k = lane * 4; k < K / 4 * 4; k += 128) {
      const float4 b = *(const float4*)(x + (long long)token * K + k);
#pragma unroll
      for (int r = 0; r < ROWS_; ++r) {
        const float4 a = __ldg((const float4*)(w + (long long)min(first + r, N - 1) * K + k));
        acc[r][0] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
  } else {
#pragma unroll 2
    for (int k = lane * 4; k < K / 4 * 4; k += 128) {
      float4 a[ROWS_];
#pragma unroll
      for (int r = 0; r < ROWS_; ++r) a[r] = __ldg((const float4*)(w + (long long)min(first + r, N - 1) * K + k));
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float4 b = *(const float4*)(x + (long long)min(token + t, tokens - 1) * K + k);
#pragma unroll
        for (int r = 0; r < ROWS_; ++r) acc[r][t] += a[r].x * b.x + a[r].y * b.y + a[r].z * b.z + a[r].w * b.w;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS_; ++r)
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
      for (int i = 16; i > 0; i /= 2) acc[r][t] += __shfl_xor_sync(0xffffffffu, acc[r][t], i);
      if (lane == 0 && t < count && first + r < N) y[(long long)(token + t) * N + first + r] = acc[r][t];
    }
}

// The TOP largest of each row of x [rows][N], the largest first, equal ones by number; NaN counts as the largest. A warp
// a row. SOFTMAX: the values are those of the row's softmax; then NORMALIZE: divided by their sum.
template <int N, int TOP, bool SOFTMAX, bool NORMALIZE, class Id>
__device__ __forceinline__ void top_k(const float* x, int rows, float* values, void* ids) {
  constexpr int EACH = (N + 31) / 32;
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  start_next_kernel();
  wait_for_previous_kernel();
  if (row >= rows) return;
  float mine[EACH], highest = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    mine[i] = 32 * i + lane < N ? x[(long long)row * N + 32 * i + lane] : -INFINITY;
    highest = fmaxf(highest, mine[i]);
  }
  if (SOFTMAX) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, i));
#pragma unroll
    for (int i = 0; i < EACH; ++i) total += 32 * i + lane < N ? __expf(mine[i] - highest) : 0.0f;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(0xffffffffu, total, i);
  }
  unsigned taken[(EACH + 31) / 32] = {};
  float sum = 0.0f, kept = 0.0f;
  for (int turn = 0; turn < TOP; ++turn) {
    float best = -INFINITY;
    int at = -1;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const bool free = 32 * i + lane < N && !(taken[i / 32] >> (i % 32) & 1);
      if (free && (at < 0 || mine[i] > best || (isnan(mine[i]) && !isnan(best)))) best = mine[i], at = 32 * i + lane;
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, i);
      const int place = __shfl_xor_sync(0xffffffffu, at, i);
      const bool wins = place >= 0 && (at < 0 || other > best || (isnan(other) && !isnan(best)) || ((other == best || (isnan(other) && isnan(best))) && place < at));
      if (wins) best = other, at = place;
    }
    if (at % 32 == lane) taken[at / 1024] |= 1u << (at / 32 % 32);
    const float value = SOFTMAX ? __expf(best - highest) / total : best;
    sum += value;
    if (turn % 32 == lane) kept = value;
    if (lane == 0) ((Id*)ids)[(long long)row * TOP + turn] = (Id)at;
    if (!NORMALIZE && lane == 0) values[(long long)row * TOP + turn] = value;
  }
  static_assert(!NORMALIZE || TOP <= 32, "a lane keeps one value");
  if (NORMALIZE && lane < TOP) values[(long long)row * TOP + lane] = kept / sum;
}

// The number of each row's largest logit, the lowest of equal ones, becomes its next token id; its position advances.
template <int N> __device__ __forceinline__ void advance(const float* logits, void* ids, void* positions) {
  __shared__ float found[32];
  __shared__ int places[32];
  start_next_kernel();
  wait_for_previous_kernel();
  const float* row = logits + (long long)blockIdx.x * N;
  float best = -INFINITY;
  int at = N;
  const auto offer = [&](float value, int place) {
    if (value > best || (value == best && place < at)) best = value, at = place;
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < N; i += blockDim.x) offer(row[i], i);
#pragma unroll
  for (int i = 16; i > 0; i /= 2) offer(__shfl_xor_sync(0xffffffffu, best, i), __shfl_xor_sync(0xffffffffu, at, i));
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best, places[threadIdx.x / 32] = at;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < blockDim.x / 32; ++i) offer(found[i], places[i]);
  ((long long*)ids)[blockIdx.x] = at < N ? at : 0, ((long long*)positions)[blockIdx.x] += 1;
}

// The code at row r (0..15) and column k (0..255) of a unit; see moqc/quant/pack_mma.py.
template <int BITS> __device__ __forceinline__ int code_at(const word* unit, int row, int k) {
  const int g = row % 8, upper = row / 8, half = k / 128, v = k / 32 % 4, q = k / 8 % 4, j = k / 2 % 4, h = k % 2, pair = 4 * v + j;
  const auto read = [&](int lane, int at) { return unit[at / 4 * 128 + lane * 4 + at % 4]; };   // word `at` of a lane
  if (BITS == 1) {
    const int number = 32 * half + 2 * pair + h, step = number / 4, place = q + 4 * (number % 4);
    return read(4 * g + 2 * (step % 2) + place / 8, step / 4) >> (16 * upper + 2 * (place % 8) + step / 2 % 2) & 1;
  }
  const int lane = 4 * g + q, first = half * 2 * BITS;
  if (BITS != 3) {
    constexpr int EACH = BITS == 3 ? 1 : 8 / BITS;
    return read(lane, first + pair / EACH) >> (16 * h + 8 * upper + BITS * (pair % EACH)) & ((1 << BITS) - 1);
  }
  const int start = first + pair / 8 * 3, p = pair % 8;
  if (p < 6) return read(lane, start + p / 2) >> (16 * h + 9 * upper + 3 * (p % 2)) & 7;
  if (p == 6 || upper == 0) return read(lane, start + (p == 6 ? upper : 2)) >> (16 * h + 6) & 7;
  int code = 0;
  for (int bit = 0; bit < 3; ++bit) code |= (read(lane, start + bit) >> (16 * h + 15) & 1) << bit;
  return code;
}
// The same of a trellis format: the value.
template <int BITS> __device__ __forceinline__ int value_at(const word* unit, int row, int k) {
  constexpr int FIELD = 1 << BITS, EACH = 8 / FIELD;
  const int q = k / 8 % 4, pair = k / 32 % 2 * 4 + k / 2 % 4, shift = 16 * (k % 2) + FIELD * (pair % EACH) + pair / EACH;
  const auto bit = [&](int plane, int row) {
    const int lane = 4 * (row % 8) + q, at = k / 64 * BITS + plane;
    return unit[at / 4 * 128 + lane * 4 + at % 4] >> (shift + row / 8 * 8) & 1;
  };
  word planes[FIELD], value = 0;
  value_planes<BITS>(planes, BITS == 3 ? bit(2, row) : 0, BITS >= 2 ? bit(1, row) : 0, bit(0, row) ^ bit(0, (row + 14) % 16), bit(0, (row + 15) % 16));
#pragma unroll
  for (int i = 0; i < FIELD; ++i) value |= (planes[i] & 1) << i;
  return value;
}

// y[token] = row ids[token] of a packed table [rows][K]; a block a token.
template <int K, class F, class Id>
__device__ __forceinline__ void embedding(const void* ids, int rows, const void* codes, const void* scales, const void* zeros, float* y) {
  constexpr int UNITS = (K + COLUMNS - 1) / COLUMNS;
  start_next_kernel();
  wait_for_previous_kernel();
  const long long id = min(max((long long)((const Id*)ids)[blockIdx.x], 0ll), (long long)rows - 1), tile = id / ROWS;
  const int row = id % ROWS;
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    const long long unit = tile * UNITS + k / COLUMNS;
    const word* words = (const word*)codes + unit * (F::BITS * 128);
    int code;
    if constexpr (F::TRELLIS) code = value_at<F::BITS>(words, row, k % COLUMNS);
    else code = code_at<F::BITS>(words, row, k % COLUMNS);
    const long long group = ((unit * 8 + row % 8) * F::GROUPS + k % COLUMNS / F::GROUP) * 2 + row / 8;
    const float zero = F::SYMMETRIC ? F::ZERO : F::ZERO_STEP * ((const unsigned char*)zeros)[group];
    const unsigned short stored = F::BYTES ? ((const unsigned char*)scales)[group] << 7 : ((const unsigned short*)scales)[group];
    y[(long long)blockIdx.x * K + k] = __half2float(__ushort_as_half(stored)) * ((float)code - zero);
  }
}

}  // namespace moqc
#endif
