// The grouped product (prefill.cu) by int8, for tiles of few tokens: weights are the codes, masked in place four at a time, and every
// activation an integer of 16 bits in two planes, as in quads.cu, whose operand A this is. A warp group's product takes 32 columns
// of planes of up to 32 tokens. Groups of 128 columns are added up, planes joined, and multiplied by both scales. All positions of
// codes share accumulators: those of the second step are shifted down first.
//
// Images: for each 128 columns and each slot two atoms of 8 rows x 128 bytes; rows 2 i and 2 i + 1 of atom n are the lower and
// upper plane of token 2 i + n. And for each of a slot's tokens two floats (*facts*): what sums are multiplied by, and the zero
// point's part (or that of a zero byte's step), which is added.
#ifndef MOQC_PREFILL_BYTES
#define MOQC_PREFILL_BYTES

namespace moqc {

constexpr int BYTE_ATOMS = 2048, BYTE_FACTS = 64;   // bytes of a slot and 128 columns

template <class F> struct ByteSteps {
  using Steps = quads::Steps<F>;
  static constexpr int GAIN = Steps::GAIN, UNIT = F::BITS == 2 ? 4 : F::BITS == 1 || F::BITS == 3 ? 8 : 1;   // UNIT: what a code of gain 1 counts
};

// Operand A of product m of 128 columns, whose 2 BITS words w has.
template <class F> __device__ __forceinline__ void shared_codes(word* a, const word* w, int m) {
  using S = quads::Steps<F>;
  if constexpr (F::BITS == 4 || F::BITS == 2) {
    const int block = S::block(m), shift = 4 * S::step(m);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const word* const pair = F::BITS == 4 ? w + 4 * block + i / 2 * 2 : w + 2 * block;
      const word mask = F::BITS == 4 ? 0x0f0f0f0fu : i / 2 ? 0x0c0c0c0cu : 0x03030303u;
      a[i] = quads::bytes_of(pair[0], pair[1], i % 2) >> shift & mask;
    }
  } else if constexpr (F::BITS == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __byte_perm(w[0], w[1], i % 2 ? 0x7632 : 0x5410) >> (m / 2 * 4) & (0x01010101u << (2 * (m % 2) + i / 2));
  } else {
    word all[4];
    quads::codes_of<F>(all, w, m);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = F::BITS == 3 && m == 3 ? all[i] >> (i % 2 ? 1 : 2) : all[i];
  }
}

// Turns 128 columns of a token into bytes, by 16 lanes that have 8 columns each: store(byte of 128, low pair, high pair). The
// lane 0 of them gets what its facts are.
template <class F, class Store> __device__ __forceinline__ float2 planes_of(const float (&x)[8], int lane, Store store) {
  constexpr int GAIN = ByteSteps<F>::GAIN;
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
#pragma unroll
  for (int other = 8; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
  most = fmaxf(most, 1e-30f);
  const float by = 32512.0f / GAIN / most;   // 127 * 256: both bytes have signs
  const int v = lane / 4 % 4, q = lane % 4;
  int all = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto to = quads::Steps<F>::place(v, q, j);
    int value[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      value[h] = (int)(__float_as_uint(fmaf(x[2 * j + h], by * to.gain, 12582912.0f)) - 0x4b400000u);
      all += GAIN / to.gain * value[h];
    }
    store(32 * to.product + 16 * to.half + (F::BITS == 1 ? j : q) * 4 + 2 * to.pair, (unsigned short)__byte_perm(value[0], value[1], 0x0040), (unsigned short)__byte_perm(value[0] + 128, value[1] + 128, 0x0051));
  }
#pragma unroll
  for (int other = 8; other > 0; other /= 2) all += __shfl_xor_sync(0xffffffffu, all, other);
  return make_float2(most * (GAIN / (32512.0f * ByteSteps<F>::UNIT)), -(F::SYMMETRIC ? F::ZERO : F::ZERO_STEP) * (float)all * (most / 32512.0f));
}

// Where byte `at` of 128 of a slot's token and plane is, in two atoms.
__device__ __forceinline__ int plane_place(int token, int plane, int at) {
  const int row = token / 2 * 2 + plane;
  return token % 2 * ATOM + row * 128 + (at / 16 ^ row) * 16 + at % 16;
}

// As `place_and_gather` (gather.cu), images by bytes and their facts. H / 128 groups; every block counts all pairs.
template <class F, int EXPERTS, int TOP, int H, int TILE_SLOTS, class Id, class X>
__device__ __forceinline__ void place_and_gather_bytes(const X* x, const Id* ids, const float* weights, int tokens, void* members, void* shares, void* hit, void* tiles, void* images, void* fact_list, int capacity) {
  constexpr int CHUNKS = (H + COLUMNS - 1) / COLUMNS * 32, WARPS = GATHER_WARPS / GATHER_TOKENS;   // of 8 columns, of a row; of a token
  constexpr int EACH = (CHUNKS + 32 * WARPS - 1) / (32 * WARPS);   // of a thread
  __shared__ int starts[EXPERTS];
  __shared__ Pairs pairs[EXPERTS];
  __shared__ int ranks[GATHER_TOKENS * TOP];
  __shared__ uint4 planes[GATHER_TOKENS][CHUNKS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, local = warp / WARPS, token = blockIdx.x * GATHER_TOKENS + local, thread = warp % WARPS * 32 + lane;
  const bool inside = token < tokens;
  wait_for_previous_kernel();
  start_next_kernel();
  float2 facts[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = e * 32 * WARPS + thread;
    if (i >= CHUNKS) break;
    X held[8];
#pragma unroll
    for (int k = 0; k < (int)sizeof(X) / 2; ++k) ((uint4*)held)[k] = inside && 8 * i < H ? ((const uint4*)(x + (long long)token * H + 8 * i))[k] : make_uint4(0, 0, 0, 0);
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = (float)held[k];
    char* const to = (char*)&planes[local][i / 16 * 16];
    facts[e] = planes_of<F>(values, lane % 16, [&](int at, unsigned short low, unsigned short high) { *(unsigned short*)(to + at) = low, *(unsigned short*)(to + 128 + at) = high; });
  }
  count_here<EXPERTS, TOP>(ids, tokens, pairs, ranks);
  place<EXPERTS, TILE_SLOTS>(starts, [&](int expert) { return pairs[expert]; }, (int*)members, (float*)shares, (int*)hit, (Tokens*)tiles);   // has all wait for all
  if (!inside) return;
#pragma unroll 1
  for (int j = 0; j < TOP; ++j) {
    const int pair = token * TOP + j, rank = ranks[local * TOP + j];
    if (rank < 0) continue;
    const int at = starts[(int)ids[pair]] + rank, slot = at / 8, place = at % 8;
    if (thread == 0) ((int*)members)[at] = token, ((float*)shares)[at] = weights[pair];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int i = e * 32 * WARPS + thread, group = i / 16;
      if (i >= CHUNKS) break;
      const long long to = (long long)group * capacity + slot;
      *(uint4*)((char*)images + to * BYTE_ATOMS + plane_place(place, i / 8 % 2, i % 8 * 16)) = planes[local][i];
      if (lane % 16 == 0) *(float2*)((char*)fact_list + to * BYTE_FACTS + place * 8) = facts[e];
    }
  }
}

// As `Rings` (prefill_tiles.cu): a stage of activations is 128 columns. Four warp groups have a block of 64 rows each.
template <int SLOTS_, int X_STAGES_, int W_STAGES_, class All_> struct ByteRings {
  using All = All_;
  static constexpr bool BYTES = true;
  static constexpr int SLOTS = SLOTS_, GROUPS = 4, MULTIPLIERS = 16, EACH = 1, ROW_TILES = 16, TOKENS = SLOTS * 8;
  static constexpr int X_STAGES = X_STAGES_, W_STAGES = W_STAGES_, X_BYTES = SLOTS * BYTE_ATOMS;
  static constexpr int SCALES = All::GROUPS * 32, ZEROS = All::HAS_ZEROS ? All::GROUPS * 16 : 0;
  static constexpr int TILE = All::BITS * 512 + SCALES + ZEROS, W_BYTES = ROW_TILES * TILE, OUT_BYTES = SLOTS * ATOM;
  static constexpr int LINE = 132;   // floats of a token's values
  static constexpr int W_AT = X_STAGES * X_BYTES, OUT_AT = W_AT + W_STAGES * W_BYTES, VALUES_AT = OUT_AT + GROUPS * OUT_BYTES, IMAGE_AT = VALUES_AT + TOKENS * LINE * 4;
  static constexpr int X_FACTS_AT = IMAGE_AT + SLOTS * (BYTE_ATOMS + BYTE_FACTS), BARRIERS_AT = X_FACTS_AT + X_STAGES * SLOTS * BYTE_FACTS, FACTS_AT = BARRIERS_AT + 256;
};

#if __CUDA_ARCH_FEAT_SM90_ALL
template <class R>
__device__ __forceinline__ void copy_planes(word shared, const char* images, const char* facts, int capacity, int slots, int units, int& count) {
  const word barriers = shared + R::BARRIERS_AT;
#pragma unroll 1
  for (int group = 0; group < 2 * units; ++group, ++count) {
    const int stage = count % R::X_STAGES;
    const word full = barriers + 8 * stage, empty = full + 8 * R::X_STAGES;
    barrier_wait(empty, (count / R::X_STAGES & 1) ^ 1);
    barrier_expect(full, slots * (BYTE_ATOMS + BYTE_FACTS));
    bulk_copy(shared + stage * R::X_BYTES, images + (long long)group * capacity * BYTE_ATOMS, slots * BYTE_ATOMS, full);
    bulk_copy(shared + R::X_FACTS_AT + stage * (R::SLOTS * BYTE_FACTS), facts + (long long)group * capacity * BYTE_FACTS, slots * BYTE_FACTS, full);
  }
}

// A warp's share of one tile: d = its rows times the tokens, as `multiply_few` leaves them.
template <int TOKENS, class R> __device__ __forceinline__ void multiply_bytes(float (&d)[128], char* memory, int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, int warp, int lane) {
  using All = typename R::All;
  using F = typename All::First;
  constexpr int WORDS = 2 * F::BITS;   // of 128 columns
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const char* const tile = memory + R::W_AT + warp * R::TILE;
  word raw[WORDS], scale = 0, zero = 0, a[2][8];
  int c[TOKENS];
  const auto load = [&](int half) {   // of a unit
    const word full = barriers + 8 * (2 * R::X_STAGES + w_at.stage), empty = full + 8 * R::W_STAGES;
    if (half == 0) barrier_wait(full, w_at.phase);
    const char* at = tile + w_at.stage * R::W_BYTES;
#pragma unroll
    for (int i = 0; i < WORDS; i += 2) {
      const int word_at = half * WORDS + i;
      const uint2 two = *(const uint2*)(at + word_at / 4 * 512 + lane * 16 + word_at % 4 * 4);
      raw[i] = two.x, raw[i + 1] = two.y;
    }
    const char* scales = at + All::BITS * 512;
    const int number = (lane / 4 * F::GROUPS + half) * 2;
    scale = F::BYTES ? *(const unsigned short*)(scales + number) : *(const word*)(scales + 2 * number);
    if (!F::SYMMETRIC) zero = *(const unsigned short*)(scales + R::SCALES + number);
    if (half == 1) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      w_at.step(1);
    }
  };
  const auto make = [&](int i) {
    shared_codes<F>(a[i], raw, 2 * i), shared_codes<F>(a[i] + 4, raw, 2 * i + 1);
#pragma unroll
    for (int k = 0; k < 8; ++k) asm volatile("" : "+r"(a[i][k])::"memory");   // made before the fence
  };
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) d[i] = 0.0f;
  load(0);
  make(0);
#pragma unroll 1
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int stage = x_at.stage;
      const word zeros = zero, scale_word = scale;
      barrier_wait(barriers + 8 * stage, x_at.phase);
      const unsigned long long b = descriptor(shared + stage * R::X_BYTES);
      wgmma_fence();
      WgmmaBytes<2 * TOKENS>::run(c, a[0], b, 0), WgmmaBytes<2 * TOKENS>::run(c, a[0] + 4, b + 2, 1);
      wgmma_commit();
      make(1);
      wgmma_fence();
      WgmmaBytes<2 * TOKENS>::run(c, a[1], b + 4, 1), WgmmaBytes<2 * TOKENS>::run(c, a[1] + 4, b + 6, 1);
      wgmma_commit();
      if (half == 0) load(1);
      else if (unit + 1 < units) load(0);
      wgmma_wait<1>();
      make(0);
      const float2 scales = __half22float2(scale_of<F>(&scale_word, 0));
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) asm volatile("" : "+r"(c[i])::"memory");
#pragma unroll
      for (int slot = 0; slot < TOKENS / 8; ++slot) {
        const float4 facts = *(const float4*)(memory + R::X_FACTS_AT + (stage * R::SLOTS + slot) * BYTE_FACTS + lane % 4 * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {   // token j / 2 of two, row half j % 2
          const int row = j % 2, at = 8 * slot + 2 * j;
          const float factor = (j / 2 ? facts.z : facts.x) * (F::BITS == 3 && row ? 0.5f : 1.0f), offset = (j / 2 ? facts.w : facts.y) * (F::SYMMETRIC ? 1.0f : (float)(zeros >> (8 * row) & 255));
          float& sum = d[4 * slot + 2 * row + j / 2];
          sum = fmaf(row ? scales.y : scales.x, fmaf((float)(c[at + 1] * 256 + c[at]), factor, offset), sum);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers + 8 * (R::X_STAGES + stage));
      x_at.step(1);
    }
  }
}

// Hidden values of the warp's half of a tile's slots (after `swap_gates`), to shared memory: 128 columns, a token a line.
template <class L, class R>
__device__ __forceinline__ void keep_values(const float (&d)[128], char* memory, const Tokens& tile, int rows, const uint2* known, const void* gate_bias, const void* up_bias, int lane) {
  constexpr int ATOMS = R::SLOTS / 2;   // of a warp
  const int warp = threadIdx.x / 32, skip = warp % 4 / 2 * ATOMS, first = warp / 4 * 32 + warp % 2 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < ATOMS; ++i) {
    if (skip + i >= tile.slots) break;
    const int token = (skip + i) * 8 + lane % 4 * 2;   // and the next
    const uint4 both = *(const uint4*)(known + token);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float share = __uint_as_float(j % 2 ? both.z : both.x);
      const int column = first + j / 2 * 8, at = rows * 128 + column;
      const bool inside = L::I % 256 == 0 || at < L::I;
      float g = d[4 * i + j], u = d[4 * ATOMS + 4 * i + j];
      if ((L::BIASES & 1) && inside) g += ((const float*)gate_bias)[(long long)tile.expert * L::I + at];
      if ((L::BIASES & 2) && inside) u += ((const float*)up_bias)[(long long)tile.expert * L::I + at];
      ((float*)(memory + R::VALUES_AT))[(token + j % 2) * R::LINE + column] = inside && share != 0.0f ? L::Activation::of(g, u) * share : 0.0f;
    }
  }
}

// The image and the facts of those 128 columns, by all warps that multiply.
template <class R, class F>
__device__ __forceinline__ void write_planes(char* memory, const Tokens& tile, int rows, void* images, void* facts, int capacity, int lane) {
  const auto all_sync = [] { asm volatile("bar.sync 5, 512;" ::: "memory"); };
  all_sync();
  const int token = threadIdx.x / 16;   // of the tile; two a warp
  if (token < tile.slots * 8) {
    const float4* from = (const float4*)(memory + R::VALUES_AT) + token * (R::LINE / 4) + lane % 16 * 2;
    const float4 low = from[0], high = from[1];
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    char* const image = memory + R::IMAGE_AT + token / 8 * BYTE_ATOMS;
    const float2 made = planes_of<F>(values, lane, [&](int at, unsigned short lower, unsigned short upper) {
      *(unsigned short*)(image + plane_place(token % 8, 0, at)) = lower, *(unsigned short*)(image + plane_place(token % 8, 1, at)) = upper;
    });
    if (lane % 16 == 0) *(float2*)(memory + R::IMAGE_AT + R::SLOTS * BYTE_ATOMS + token * 8) = made;
  }
  fence_for_bulk();
  all_sync();
  if (threadIdx.x != 0) return;
  const long long to = (long long)rows * capacity + tile.first;
  bulk_store((char*)images + to * BYTE_ATOMS, shared_address(memory + R::IMAGE_AT), tile.slots * BYTE_ATOMS);
  bulk_store((char*)facts + to * BYTE_FACTS, shared_address(memory + R::IMAGE_AT + R::SLOTS * BYTE_ATOMS), tile.slots * BYTE_FACTS);
}
#endif

}  // namespace moqc
#endif
