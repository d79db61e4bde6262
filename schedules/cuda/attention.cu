// Attention with a key-value cache in fp16, for any number of tokens.
//
// `attend` multiplies on tensor cores, once `heads` (heads.cu) has filled the cache. The rows of its products are (token, head) pairs that share a key head. A block of 4 warps takes 64 such rows,
// or for few rows 16, its warps taking turns at the keys; then the keys are also split over blocks, and the last block to
// finish adds up.
#ifndef MOQC_ATTENTION
#define MOQC_ATTENTION

namespace moqc {

constexpr int KEYS = 64;   // keys in shared memory at a time
constexpr float LOG2_E = 1.44269504f;

__device__ __forceinline__ void matrices(word (&d)[4], const __half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"((word)__cvta_generic_to_shared(p)) : "memory");
}
__device__ __forceinline__ void matrices_transposed(word (&d)[4], const __half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"((word)__cvta_generic_to_shared(p)) : "memory");
}
__device__ __forceinline__ void copy16_or_zero(__half* shared, const __half* p, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"((word)__cvta_generic_to_shared(shared)), "l"(p), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ word pair_of(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *(const word*)&pair;
}

// What a warp knows of its 16 rows: sums so far, relative to 2^highest. A lane has rows lane / 4 and 8 more.
template <int VALUE_WIDTH> struct Rows {
  float sums[VALUE_WIDTH / 8][4], highest[2], total[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < VALUE_WIDTH / 8; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    highest[0] = highest[1] = -INFINITY, total[0] = total[1] = 0.0f;
  }
};

// 16 rows against COUNT keys from `keys` on, in shared memory with these pitches. `first` is the first key's position;
// `low`, `high`: what the lane's two rows may see.
template <int WIDTH, int VALUE_WIDTH, int COUNT>
__device__ __forceinline__ void attend_tile(Rows<VALUE_WIDTH>& rows, const word (&q)[WIDTH / 16][4], const __half* keys, const __half* values, int first,
                                            const int (&low)[2], const int (&high)[2], float scale, float softcap) {
  constexpr int PITCH = WIDTH + 8, VALUE_PITCH = VALUE_WIDTH + 8;
  const int lane = threadIdx.x % 32;
  float scores[COUNT / 8][4];
#pragma unroll
  for (int n = 0; n < COUNT / 8; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
  for (int d = 0; d < WIDTH / 16; ++d)
#pragma unroll
    for (int n = 0; n < COUNT / 16; ++n) {
      word b[4];
      matrices(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + d * 16 + lane / 8 % 2 * 8);
      mma(scores[2 * n], q[d], b[0], b[1]);
      mma(scores[2 * n + 1], q[d], b[2], b[3]);
    }
  float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < COUNT / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + n * 8 + lane % 4 * 2 + i % 2;
      float score = scores[n][i] * scale;
      if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
      scores[n][i] = key >= low[i / 2] && key <= high[i / 2] ? score * LOG2_E : -INFINITY;
      most[i / 2] = fmaxf(most[i / 2], scores[n][i]);
    }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 2));
    const float highest = fmaxf(rows.highest[r], most[r]);
    base[r] = highest == -INFINITY ? 0.0f : highest;   // nothing seen yet: every power below is 0
    const float shrink = exp2f(rows.highest[r] - base[r]);
    rows.highest[r] = highest, rows.total[r] *= shrink;
#pragma unroll
    for (int n = 0; n < VALUE_WIDTH / 8; ++n) rows.sums[n][2 * r] *= shrink, rows.sums[n][2 * r + 1] *= shrink;
  }
#pragma unroll
  for (int n = 0; n < COUNT / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = exp2f(scores[n][i] - base[i / 2]);
      rows.total[i / 2] += scores[n][i];
    }
#pragma unroll
  for (int k = 0; k < COUNT / 16; ++k) {
    const word a[4] = {pair_of(scores[2 * k][0], scores[2 * k][1]), pair_of(scores[2 * k][2], scores[2 * k][3]),
                       pair_of(scores[2 * k + 1][0], scores[2 * k + 1][1]), pair_of(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < VALUE_WIDTH / 16; ++n) {
      word b[4];
      matrices_transposed(b, values + (k * 16 + lane / 8 % 2 * 8 + lane % 8) * VALUE_PITCH + n * 16 + lane / 16 * 8);
      mma(rows.sums[2 * n], a, b[0], b[1]);
      mma(rows.sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// out [batch][token][head][VALUE_WIDTH]. FEW: 16 rows a block; `splits` blocks share a sequence's keys, what they find
// goes to `parts` (for each split and row VALUE_WIDTH sums, then the highest, then the total) and `done` counts them.
// Grid: row blocks, then splits, key heads, sequences.
template <int QUERIES, int KEY_HEADS, int WIDTH, int VALUE_WIDTH, bool FEW, bool SINKS>
__device__ __forceinline__ void attend(void* memory, const void* queries, const __half* k_cache, const __half* v_cache, const void* positions,
                                       const float* sinks, int tokens, int context, int splits, float scale, int window, float softcap,
                                       void* parts_, void* done, float* out) {
  constexpr int GROUP = QUERIES / KEY_HEADS, PITCH = WIDTH + 8, VALUE_PITCH = VALUE_WIDTH + 8, STAGE = KEYS * (PITCH + VALUE_PITCH);
  constexpr int ROOM = VALUE_WIDTH + 2, SPAN = FEW ? 16 : 64;   // rows of a block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = tokens * GROUP, blocks = (rows + SPAN - 1) / SPAN;
  const int block = blockIdx.x % blocks, split = blockIdx.x / blocks % splits, pair = blockIdx.x / blocks / splits;   // pair: of sequence and key head
  const int key_head = pair % KEY_HEADS, sequence = pair / KEY_HEADS, first_row = block * SPAN + (FEW ? 0 : warp * 16);
  const long long* const places = (const long long*)positions + (long long)sequence * tokens;
  start_next_kernel();
  wait_for_previous_kernel();
  // The keys that this block's rows may see: from `begin` up to `end`.
  int begin = context, end = 0;
  for (int token = block * SPAN / GROUP; token <= min((block * SPAN + SPAN - 1) / GROUP, tokens - 1); ++token) {
    const int place = (int)places[token];
    if (place < 0) continue;
    end = max(end, min(place + 1, context)), begin = min(begin, window > 0 ? max(place - window + 1, 0) : 0);
  }
  begin = begin / KEYS * KEYS;
  const int tiles = end > begin ? (end - begin + KEYS - 1) / KEYS : 0, active = FEW ? max(min(splits, tiles), 1) : 1;
  if (split >= active) return;
  const int first_tile = tiles * split / active, last_tile = tiles * (split + 1) / active;
  // The lane's two rows: their queries, and what they may see.
  word q[WIDTH / 16][4];
  int low[2], high[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + lane / 4 + 8 * r, token = row / GROUP;
    const bool there = row < rows;
    const int place = there ? (int)places[token] : -1;
    high[r] = place, low[r] = window > 0 ? place - window + 1 : 0;
    const __half* from = (const __half*)queries + (((long long)sequence * tokens + (there ? token : 0)) * QUERIES + key_head * GROUP + row % GROUP) * WIDTH;
#pragma unroll
    for (int d = 0; d < WIDTH / 16; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        q[d][2 * half + r] = there ? *(const word*)(from + d * 16 + half * 8 + lane % 4 * 2) : 0u;
  }
  __half* const staged = (__half*)memory;
  const long long cache = (long long)pair * context;
  const auto stage = [&](int tile) {
    if (tile < last_tile) {
      __half *keys = staged + (tile & 1) * STAGE, *values = keys + KEYS * PITCH;
      const int first = begin + tile * KEYS;
      for (int i = threadIdx.x; i < KEYS * (WIDTH / 8); i += 128) {
        const int key = i / (WIDTH / 8), d = i % (WIDTH / 8) * 8, at = min(first + key, context - 1);
        copy16_or_zero(keys + key * PITCH + d, k_cache + (cache + at) * WIDTH + d, first + key < end);
      }
      for (int i = threadIdx.x; i < KEYS * (VALUE_WIDTH / 8); i += 128) {
        const int key = i / (VALUE_WIDTH / 8), d = i % (VALUE_WIDTH / 8) * 8, at = min(first + key, context - 1);
        copy16_or_zero(values + key * VALUE_PITCH + d, v_cache + (cache + at) * VALUE_WIDTH + d, first + key < end);
      }
    }
    copy_commit();
  };
  Rows<VALUE_WIDTH> mine;
  mine.clear();
  stage(first_tile);
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; ++tile) {
    stage(tile + 1);
    copy_wait<1>();
    __syncthreads();
    const __half *keys = staged + (tile & 1) * STAGE, *values = keys + KEYS * PITCH;
    const int first = begin + tile * KEYS;
    if constexpr (FEW)
      attend_tile<WIDTH, VALUE_WIDTH, KEYS / 4>(mine, q, keys + warp * 16 * PITCH, values + warp * 16 * VALUE_PITCH, first + warp * 16, low, high, scale, softcap);
    else
      attend_tile<WIDTH, VALUE_WIDTH, KEYS>(mine, q, keys, values, first, low, high, scale, softcap);
    __syncthreads();
  }
  copy_wait<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    mine.total[r] += __shfl_xor_sync(0xffffffffu, mine.total[r], 1);
    mine.total[r] += __shfl_xor_sync(0xffffffffu, mine.total[r], 2);
  }
  const auto place_of = [&](int row) { return ((long long)sequence * tokens + row / GROUP) * QUERIES + key_head * GROUP + row % GROUP; };
  const auto sink_of = [&](int row) { return SINKS ? sinks[key_head * GROUP + row % GROUP] * LOG2_E : -INFINITY; };
  if constexpr (!FEW) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane / 4 + 8 * r;
      if (row >= rows) continue;
      const float sink = sink_of(row), top = fmaxf(mine.highest[r], sink), shrink = top == -INFINITY ? 0.0f : exp2f(mine.highest[r] - top);
      const float total = mine.total[r] * shrink + (sink == -INFINITY ? 0.0f : exp2f(sink - top)), factor = total > 0.0f ? shrink / total : 0.0f;
      float* const to = out + place_of(row) * VALUE_WIDTH + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < VALUE_WIDTH / 8; ++n) *(float2*)(to + n * 8) = make_float2(mine.sums[n][2 * r] * factor, mine.sums[n][2 * r + 1] * factor);
    }
  } else {
    // The warps' sums to shared memory, [warp][row][ROOM]; then, with several splits, the block's to `parts`.
    float* const room = (float*)memory;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const to = room + (warp * 16 + lane / 4 + 8 * r) * ROOM;
#pragma unroll
      for (int n = 0; n < VALUE_WIDTH / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) to[n * 8 + lane % 4 * 2 + i] = mine.sums[n][2 * r + i];
      if (lane % 4 == 0) to[VALUE_WIDTH] = mine.highest[r], to[VALUE_WIDTH + 1] = mine.total[r];
    }
    __syncthreads();
    float* const parts = (float*)parts_ + (long long)pair * splits * (16 * ROOM);
    const auto merge_room = [&](int row, int d, float sink, float& top, float& total) {
      top = sink;
      for (int i = 0; i < 4; ++i) top = fmaxf(top, room[(i * 16 + row) * ROOM + VALUE_WIDTH]);
      const float base = top == -INFINITY ? 0.0f : top;
      float sum = 0.0f;
      total = sink == -INFINITY ? 0.0f : exp2f(sink - base);
      for (int i = 0; i < 4; ++i) {
        const float shrink = exp2f(room[(i * 16 + row) * ROOM + VALUE_WIDTH] - base);
        sum += shrink * room[(i * 16 + row) * ROOM + d], total += shrink * room[(i * 16 + row) * ROOM + VALUE_WIDTH + 1];
      }
      return sum;
    };
    float top, total;
    if (active == 1) {
      for (int i = threadIdx.x; i < min(16, rows) * VALUE_WIDTH; i += 128) {
        const int row = i / VALUE_WIDTH, d = i % VALUE_WIDTH;
        const float sum = merge_room(row, d, sink_of(row), top, total);
        out[place_of(row) * VALUE_WIDTH + d] = total > 0.0f ? sum / total : 0.0f;
      }
      return;
    }
    for (int i = threadIdx.x; i < 16 * VALUE_WIDTH; i += 128) {
      const int row = i / VALUE_WIDTH, d = i % VALUE_WIDTH;
      float* const to = parts + (split * 16 + row) * ROOM;
      to[d] = merge_room(row, d, -INFINITY, top, total);
      if (d == 0) to[VALUE_WIDTH] = top, to[VALUE_WIDTH + 1] = total;
    }
    __shared__ int before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd((int*)done + pair, 1);
    __syncthreads();
    if (before != active - 1) return;
    __threadfence();
    // Shares of the splits, [row][split] in shared memory, then their sums: all loads of a thread are independent.
    float* const shares = room;
    for (int i = threadIdx.x; i < 16 * active; i += 128) {
      const int row = i / active, part = i % active;
      shares[row * splits + part] = __ldcg(parts + (part * 16 + row) * ROOM + VALUE_WIDTH);
      shares[(16 + row) * splits + part] = __ldcg(parts + (part * 16 + row) * ROOM + VALUE_WIDTH + 1);
    }
    __syncthreads();
    if (threadIdx.x < min(16, rows)) {
      const int row = threadIdx.x;
      const float sink = sink_of(row);
      top = sink;
      for (int part = 0; part < active; ++part) top = fmaxf(top, shares[row * splits + part]);
      const float base = top == -INFINITY ? 0.0f : top;
      total = sink == -INFINITY ? 0.0f : exp2f(sink - base);
      for (int part = 0; part < active; ++part) {
        const float shrink = exp2f(shares[row * splits + part] - base);
        total += shrink * shares[(16 + row) * splits + part], shares[row * splits + part] = shrink;
      }
      for (int part = 0; part < active; ++part) shares[row * splits + part] = total > 0.0f ? shares[row * splits + part] / total : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(16, rows) * VALUE_WIDTH; i += 128) {
      const int row = i / VALUE_WIDTH, d = i % VALUE_WIDTH;
      float sum = 0.0f;
#pragma unroll 8
      for (int part = 0; part < active; ++part) sum = fmaf(shares[row * splits + part], __ldcg(parts + (part * 16 + row) * ROOM + d), sum);
      out[place_of(row) * VALUE_WIDTH + d] = sum;
    }
  }
}

}  // namespace moqc
#endif
