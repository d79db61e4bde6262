// The first grouped product (prefill.cu): gate and up, and the images of hidden values that the second reads.
#ifndef MOQC_PREFILL_GATE_UP
#define MOQC_PREFILL_GATE_UP

namespace moqc {
#if __CUDA_ARCH_FEAT_SM90_ALL
// Of 64 rows of a warp group two warps have gate's and two up's. Each gives the half of its tokens that the other is to finish: then
// d[0..63] are gates and d[64..127] ups of 16 rows and 128 tokens. In two rounds through 4 KiB of shared memory a warp.
template <int HALF> __device__ __forceinline__ void swap_gates(float (&d)[128], char* out, int group, int warp, int lane) {
  constexpr int ROUNDS = HALF > 32 ? 2 : 1, EACH = HALF / 4 / ROUNDS;   // EACH: 16 bytes of a thread
  const bool gates = warp % 4 < 2;
  float4 *mine = (float4*)out + warp % 4 * (32 * EACH) + lane, *other = (float4*)out + (warp % 4 ^ 2) * (32 * EACH) + lane;
  const auto together = [&] { asm volatile("bar.sync %0, 64;" ::"r"(6 + group * 2 + warp % 2) : "memory"); };
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const auto exchange = [&](float* part) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) mine[32 * i] = make_float4(part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]);
      together();
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const float4 got = other[32 * i];
        part[4 * i] = got.x, part[4 * i + 1] = got.y, part[4 * i + 2] = got.z, part[4 * i + 3] = got.w;
      }
      together();
    };
    if (gates) exchange(d + HALF + 4 * EACH * round);
    else exchange(d + 4 * EACH * round);
  }
}

// This warp group's share of `bytes` zeros, of which it has `each` in shared memory. They leave while products are made.
template <int GROUPS> __device__ __forceinline__ void clear(float* y, long long bytes, char* out, int each, int group) {
  for (int i = threadIdx.x % 128; i < each / 16; i += 128) ((uint4*)out)[i] = make_uint4(0, 0, 0, 0);
  fence_for_bulk();
  group_sync(group);
  if (threadIdx.x % 128 != 0) return;
  for (long long at = (long long)(blockIdx.x * GROUPS + group) * each; at < bytes; at += (long long)gridDim.x * GROUPS * each)
    bulk_store((char*)y + at, shared_address(out), (int)min((long long)each, bytes - at));
}

// Values of an image's atom (8 tokens) that a lane has, in fp16: rows g and g + 8 of a row tile become columns of one token each.
struct Hidden { word low, high; int token; };

// act(gate x + bias, up x + bias) * share of one atom; row: the lane's first. A value beyond fp16 is noted in `over`, or where
// AGAIN, all are divided as it says.
template <class L, bool AGAIN>
__device__ __forceinline__ Hidden hidden_of(const float* gates, const float* ups, const uint2* known, int first, int row, int expert, const void* gate_bias, const void* up_bias, void* over_list, void* hit, int lane) {
  const uint4 both = *(const uint4*)(known + lane % 4 * 2);
  const float2 share = make_float2(__uint_as_float(both.x), __uint_as_float(both.z)), factor = make_float2(__uint_as_float(both.y) * (1 << SMALLER), __uint_as_float(both.w) * (1 << SMALLER));
  first += lane % 4 * 2;
  float by0 = 1.0f, by1 = 1.0f;
  if (AGAIN) by0 = power(-shift_of(__uint_as_float(((const word*)over_list)[first]))), by1 = power(-shift_of(__uint_as_float(((const word*)over_list)[first + 1])));
  float values[2][2];   // row, token
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = row + 8 * i;
    const bool inside = L::I % 256 == 0 || at < L::I;
    float g = 0.0f, u = 0.0f;
    if ((L::BIASES & 1) && inside) g = ((const float*)gate_bias)[(long long)expert * L::I + at];
    if ((L::BIASES & 2) && inside) u = ((const float*)up_bias)[(long long)expert * L::I + at];
    values[i][0] = L::Activation::of(gates[2 * i] * factor.x + g, ups[2 * i] * factor.x + u) * share.x;
    values[i][1] = L::Activation::of(gates[2 * i + 1] * factor.y + g, ups[2 * i + 1] * factor.y + u) * share.y;
    if (!inside || share.x == 0.0f) values[i][0] = 0.0f;
    if (!inside || share.y == 0.0f) values[i][1] = 0.0f;
  }
  const float most0 = fmaxf(fabsf(values[0][0]), fabsf(values[1][0])), most1 = fmaxf(fabsf(values[0][1]), fabsf(values[1][1]));
  if (AGAIN) {
    values[0][0] *= by0, values[1][0] *= by0, values[0][1] *= by1, values[1][1] *= by1;
  } else if (fmaxf(most0, most1) >= 65504.0f) {
    if (most0 >= 65504.0f) atomicMax((word*)over_list + first, __float_as_uint(most0));
    if (most1 >= 65504.0f) atomicMax((word*)over_list + first + 1, __float_as_uint(most1));
    ((volatile int*)hit)[2] = 1;
  }
  word packed_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 pair = both_rows(values[i][0], values[i][1], lane);
    const __half2 rounded = __floats2half2_rn(pair.x, pair.y);
    packed_rows[i] = *(const word*)&rounded;
  }
  return {packed_rows[0], packed_rows[1], lane % 4 * 2 + (lane >> 2 & 1)};
}
#endif

// The images of hidden = share * act(gate x + bias, up x + bias) in fp16. A value beyond fp16 is noted in `over` (the
// largest of its token), and hit[2] set; the launch after this one (AGAIN) then makes all images once more, divided. y [tokens][H] is
// set to 0 for `down` to add to.
template <class L, class R, bool AGAIN, class Down, class Gates, class Ups, class... Tensors>
__device__ __forceinline__ void gate_up_grouped(void* memory, const void* tile_list, void* hit, const void* x_images, const void* factor_list, const void* share_list, void* over_list,
                                                const int* table, const void* gate_bias, const void* up_bias, void* hidden_images, const void* x_facts, void* hidden_facts, int capacity, float* y, int tokens, const Tensors*... packed) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int UNITS = (L::H + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::I + ROWS - 1) / ROWS;
  constexpr int TILES = L::GATED ? R::ROW_TILES / 2 : R::ROW_TILES, ROWS_EACH = TILES * ROWS;   // a block's, of one matrix
  constexpr int ROW_BLOCKS = ((L::I + COLUMNS - 1) / COLUMNS * COLUMNS + ROWS_EACH - 1) / ROWS_EACH;   // zeros for `down` up to whole units
  static_assert(L::GATED || !R::BYTES, "gates and ups");
  constexpr bool HALVES = L::GATED && R::EACH == 1;   // a warp has rows of one matrix, a warp group half an image's columns
  wait_for_previous_kernel();
  start_next_kernel();
  if (AGAIN && ((const int*)hit)[2] == 0) return;
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  char* out = (char*)memory + R::OUT_AT + group * R::OUT_BYTES;
  if (!AGAIN && warp < R::MULTIPLIERS) clear<R::GROUPS>(y, (long long)tokens * L::H * 4, out, R::OUT_BYTES, group);
  const auto where = [&](int expert, int rows) {
    constexpr long long EACH = (long long)ROW_TILES * UNITS;
    const int2 second_at = Ups::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + L::EXPERTS + expert);
    const Matrix second = matrix_of(Ups{}, tensors + 3 * Gates::COUNT, second_at, EACH);
    Matrix first = second;
    if constexpr (L::GATED) first = matrix_of(Gates{}, tensors, Gates::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + expert), EACH);
    return [=](int number, int& row_tile) {   // of a block's row tiles; every second half of a warp group's are up's
      constexpr int GROUP = R::ROW_TILES / R::GROUPS, HALF = GROUP / 2;
      row_tile = min(rows * TILES + (L::GATED ? number / GROUP * HALF + number % HALF : number), ROW_TILES - 1);
      return L::GATED && number % GROUP < HALF ? first : second;
    };
  };
  const auto facts = [&](int at) { return make_uint2(((const word*)share_list)[at], R::BYTES ? 0 : ((const word*)factor_list)[at]); };
  const auto finish = [&](float (&d)[128], const Tokens& tile, int rows, int slice, const uint2* known) {
    const auto value = [&](int at, int up_at, int atom, int row) {
      return hidden_of<L, AGAIN>(d + at, d + up_at, known + atom * 8, (tile.first + atom) * 8, row + lane / 4, tile.expert, gate_bias, up_bias, over_list, hit, lane);
    };
    if constexpr (R::BYTES) {
      if (threadIdx.x % 128 == 0) bulk_store_wait();   // until zeros have left, and the image before
      group_sync(group);
      swap_gates<2 * R::SLOTS>(d, out, group, warp, lane);
      keep_values<L, R>(d, (char*)memory, tile, rows, known, gate_bias, up_bias, lane);
      write_planes<R, Down>((char*)memory, tile, rows, hidden_images, hidden_facts, capacity, lane);
    } else if constexpr (HALVES) {
      if (threadIdx.x % 128 == 0) bulk_store_wait();   // until zeros have left
      group_sync(group);
      constexpr int ATOMS = R::SLOTS > 16 ? 16 : R::SLOTS / 2;   // of a warp
      swap_gates<4 * ATOMS>(d, out, group, warp, lane);
      group_sync(group);
      const int row = rows * ROWS_EACH + group * 32 + warp % 2 * 16, skip = warp % 4 / 2 * ATOMS;   // atoms of the other warps
#pragma unroll
      for (int i = 0; i < ATOMS; ++i) {
        if (skip + i >= tile.slots) break;
        const Hidden h = value(4 * i, 4 * ATOMS + 4 * i, skip + i, row);
        *(uint2*)(out + (skip + i) * (ATOM / 2) + h.token * 64 + (lane / 8 ^ h.token % 4) * 16 + warp % 2 * 8) = make_uint2(h.low, h.high);
      }
      group_sync(group);
      char* to = (char*)hidden_images + ((long long)(row / 64) * capacity + tile.first) * ATOM;
#pragma unroll
      for (int i = 0; i < (R::SLOTS + 3) / 4; ++i) {
        const int at = i * 128 + threadIdx.x % 128, token = at / 4;   // of the tile
        if (token < tile.slots * 8) *(uint4*)(to + token * 128 + (group % 2 ^ token / 4 % 2) * 64 + at % 4 * 16) = ((const uint4*)out)[at];
      }
      group_sync(group);
    } else {
      constexpr int ATOMS = R::SLOTS < 16 ? R::SLOTS : 16;
#pragma unroll
      for (int half = 0; half < (L::GATED || R::GROUPS == 4 ? 1 : 2); ++half) {   // of d
        const int row0 = rows * ROWS_EACH + group * (ROWS_EACH / R::GROUPS) + (R::EACH == 2 ? half * 64 : 0);   // of 64
        const int skip = R::EACH == 1 ? half * 16 : 0;
        if (threadIdx.x % 128 == 0) bulk_store_wait();   // until the image before has left
        group_sync(group);
#pragma unroll
        for (int i = 0; i < ATOMS; ++i) {
          if (skip + i >= tile.slots) break;
          const Hidden h = value((L::GATED ? 0 : half * 64) + 4 * i, (L::GATED ? 64 : half * 64) + 4 * i, skip + i, row0 + warp % 4 * 16);
          const int chunk = warp % 4 / 2 * 4 + lane / 8;
          *(uint2*)(out + i * ATOM + h.token * 128 + (chunk ^ h.token) * 16 + warp % 2 * 8) = make_uint2(h.low, h.high);
        }
        fence_for_bulk();
        group_sync(group);
        const int slots = min(tile.slots - skip, ATOMS);
        if (threadIdx.x % 128 == 0 && slots > 0)
          bulk_store((char*)hidden_images + ((long long)(row0 / 64) * capacity + tile.first + skip) * ATOM, shared_address(out), slots * ATOM);
      }
    }
  };
  grouped<R, UNITS, 1, ROW_BLOCKS, AGAIN>((char*)memory, tile_list, ((const int*)hit)[1] * ROW_BLOCKS, (const char*)x_images, (const char*)x_facts, capacity, where, facts, finish);
  if (threadIdx.x % 128 == 0) bulk_store_finish();
#endif
}

}  // namespace moqc
#endif
