// Device code of moqc's grouped product for many tokens by mma.sync: GPUs without Hopper's warp groups (sm_80 to sm_89).
//
// A block takes 16 row tiles (gate and up of 8, or 16 of one matrix) of an expert and up to 64 of its tokens. Its eight
// warps each turn two row tiles' weights into fp16, in registers, a unit at a time; the tokens' activations for that unit
// lie in shared memory, the next unit's on their way. Blocks stay, and take tiles in turn.
#ifndef MOQC_PREFILL_MMA
#define MOQC_PREFILL_MMA

namespace moqc {

constexpr int MMA_WARPS = 8, MMA_SLOTS = 8, MMA_TOKENS = 8 * MMA_SLOTS;   // of a tile, at most

// fp16 copies of x [T][H], rows padded with zeros to whole units, a block a token; rows that reach HALF_LIMIT are divided by
// the power of two in `factors`. y [T][H] and `over` are cleared.
template <int H, class X>
__device__ __forceinline__ void halve(const X* x, const void* hit, void* halves, void* factors, void* over_list, float* y) {
  constexpr int PADDED = (H + COLUMNS - 1) / COLUMNS * COLUMNS;
  __shared__ float found[32];
  wait_for_previous_kernel();
  start_next_kernel();
  const X* row = x + (long long)blockIdx.x * H;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < *(const int*)hit * 8; i += gridDim.x * blockDim.x) ((word*)over_list)[i] = 0;
  float most = 0.0f;
  for (int k = threadIdx.x; k < H; k += blockDim.x) most = fmaxf(most, fabsf((float)row[k])), y[(long long)blockIdx.x * H + k] = 0.0f;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; ++i) most = fmaxf(most, found[i]);
  const int shift = most < HALF_LIMIT ? 0 : shift_of(most);
  const float by = power(-shift);
  for (int k = threadIdx.x; k < PADDED; k += blockDim.x)
    ((__half*)halves)[(long long)blockIdx.x * PADDED + k] = __float2half(k < H ? (float)row[k] * by : 0.0f);
  if (threadIdx.x == 0) ((float*)factors)[blockIdx.x] = power(shift);
}

// acc[0] and acc[1]: the warp's two row tiles times 8 * COLUMN_TILES rows of `from`, of PADDED columns each; `row_of(i)`
// is the row of column i.
template <class All, int UNITS, int COLUMN_TILES, class Row>
__device__ __forceinline__ void multiply_rows(float (&acc)[2][COLUMN_TILES][4], __half* staged, const __half* from, Unit (&units)[2], int lane, int warp, Row row_of) {
  constexpr int TOKENS = 8 * COLUMN_TILES, EACH = TOKENS / MMA_WARPS, PADDED = UNITS * COLUMNS;
  long long rows[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) rows[i] = row_of(warp + MMA_WARPS * i);
#pragma unroll
  for (int i = 0; i < 4 * COLUMN_TILES; ++i) acc[0][i / 4][i % 4] = acc[1][i / 4][i % 4] = 0.0f;
  const auto stage = [&](int unit) {
    if (unit < UNITS) {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        copy16((word)__cvta_generic_to_shared(staged + (unit % 2 * MMA_TOKENS + warp + MMA_WARPS * i) * STAGED_PITCH + lane * 8), from + rows[i] * PADDED + unit * COLUMNS + lane * 8);
    }
    copy_commit();
  };
  Window<All, 2> window;
#pragma unroll
  for (int block = 0; block < 2; ++block) window.load(block, units[block]);
  stage(0);
#pragma unroll 1
  for (int unit = 0; unit < UNITS; ++unit) {
    stage(unit + 1);
    copy_wait<1>();
    __syncthreads();
    const __half* x = staged + (unit % 2 * MMA_TOKENS + lane / 4) * STAGED_PITCH + lane % 4 * 8;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      with_format(All{}, units[block].id, [&](auto format) {
        multiply_staged<decltype(format), COLUMN_TILES>(acc[block], window.codes[block], window.scales[block], window.zeros[block], x, lane);
      });
      units[block].step(1);
      if (unit + 1 < UNITS) window.load(block, units[block]);   // while the other's are multiplied
    }
    __syncthreads();   // before the next unit but one takes its place
  }
  copy_wait<0>();
}

// The frame of both products; `work(tile, rows, number)` does one item with Number<column tiles>.
template <int ROW_BLOCKS, class Work> __device__ __forceinline__ void each_tile(const void* tile_list, const void* hit, Work work) {
  const int items = ((const int*)hit)[1] * ROW_BLOCKS;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    int rows;
    const Tokens tile = take<ROW_BLOCKS, MMA_SLOTS>(tile_list, item, rows);
    if (tile.slots <= MMA_SLOTS / 2) work(tile, rows, Number<MMA_SLOTS / 2>{});
    else work(tile, rows, Number<MMA_SLOTS>{});
  }
}

template <class Fs> __device__ __forceinline__ int2 place_of(const int* table, int expert) {
  return Fs::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + expert);
}

// hidden[slot * 8 + column][padded I] = share * act(gate x + bias, up x + bias) in fp16. A value beyond fp16 is noted as
// gate_up_grouped does it, and AGAIN works likewise.
template <class L, bool AGAIN, class Gates, class Ups, class All, class... Tensors>
__device__ __forceinline__ void gate_up_tiled(void* memory, const void* tile_list, void* hit, const void* halves, const void* factors, const void* share_list, const void* member_list,
                                              void* over_list, const int* table, const void* gate_bias, const void* up_bias, void* hidden_rows, const Tensors*... packed) {
  constexpr int UNITS = (L::H + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::I + ROWS - 1) / ROWS, PADDED = (L::I + COLUMNS - 1) / COLUMNS * COLUMNS;
  constexpr int EACH = (L::GATED ? 1 : 2) * MMA_WARPS * ROWS, ROW_BLOCKS = PADDED / EACH;
  static_assert(PADDED % EACH == 0, "whole blocks of rows");
  wait_for_previous_kernel();
  start_next_kernel();
  if (AGAIN && ((const int*)hit)[2] == 0) return;
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int* members = (const int*)member_list;
  each_tile<ROW_BLOCKS>(tile_list, hit, [&](const Tokens& tile, int rows, auto number) {
    constexpr int TILES = decltype(number)::value;
    constexpr long long MATRIX = (long long)ROW_TILES * UNITS;
    Unit units[2];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int row_tile = min(L::GATED ? rows * MMA_WARPS + warp : rows * 2 * MMA_WARPS + block * MMA_WARPS + warp, ROW_TILES - 1);
      if (L::GATED && block == 0) units[0] = locate(Gates{}, tensors, place_of<Gates>(table, tile.expert), MATRIX, (long long)row_tile * UNITS, lane);
      else units[block] = locate(Ups{}, tensors + 3 * Gates::COUNT, place_of<Ups>(table + 2 * L::EXPERTS, tile.expert), MATRIX, (long long)row_tile * UNITS, lane);
    }
    const auto row_of = [&](int i) { return (long long)(i < tile.slots * 8 ? max(members[tile.first * 8 + i], 0) : 0); };
    float acc[2][TILES][4];
    multiply_rows<All, UNITS, TILES>(acc, (__half*)memory, (const __half*)halves, units, lane, warp, row_of);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = (tile.first + n) * 8 + lane % 4 * 2 + i % 2;
        if (n >= tile.slots) continue;
        const float share = ((const float*)share_list)[column], factor = ((const float*)factors)[max(members[column], 0)];
        const float again = AGAIN ? power(-shift_of(__uint_as_float(((const word*)over_list)[column]))) : 1.0f;
#pragma unroll
        for (int block = 0; block < (L::GATED ? 1 : 2); ++block) {
          const int row = (L::GATED ? rows * MMA_WARPS + warp : rows * 2 * MMA_WARPS + block * MMA_WARPS + warp) * ROWS + lane / 4 + i / 2 * 8;
          const bool inside = row < L::I && share != 0.0f;
          float g = 0.0f, u = 0.0f;
          if ((L::BIASES & 1) && inside) g = ((const float*)gate_bias)[(long long)tile.expert * L::I + row];
          if ((L::BIASES & 2) && inside) u = ((const float*)up_bias)[(long long)tile.expert * L::I + row];
          float value = inside ? L::Activation::of(acc[L::GATED ? 0 : block][n][i] * factor + g, acc[L::GATED ? 1 : block][n][i] * factor + u) * share : 0.0f;
          if (AGAIN) {
            value *= again;
          } else if (fabsf(value) >= 65504.0f) {
            atomicMax((word*)over_list + column, __float_as_uint(fabsf(value)));
            ((volatile int*)hit)[2] = 1;
          }
          ((__half*)hidden_rows)[(long long)column * PADDED + row] = __float2half(value);
        }
      }
  });
}

// y[token][H] += down x hidden + share * bias.
template <class L, class Downs, class All, class... Tensors>
__device__ __forceinline__ void down_tiled(void* memory, const void* tile_list, const void* hit, const void* hidden_rows, const void* share_list, const void* member_list, const void* over_list,
                                           const int* table, const void* bias, float* y, const Tensors*... packed) {
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, EACH = 2 * MMA_WARPS, ROW_BLOCKS = (ROW_TILES + EACH - 1) / EACH;
  wait_for_previous_kernel();
  start_next_kernel();
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  each_tile<ROW_BLOCKS>(tile_list, hit, [&](const Tokens& tile, int rows, auto number) {
    constexpr int TILES = decltype(number)::value;
    const int2 place = place_of<Downs>(table + 4 * L::EXPERTS, tile.expert);
    Unit units[2];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int row_tile = min(rows * EACH + block * MMA_WARPS + warp, ROW_TILES - 1);
      units[block] = locate(Downs{}, tensors, place, (long long)ROW_TILES * UNITS, (long long)row_tile * UNITS, lane);
    }
    const auto row_of = [&](int i) { return (long long)tile.first * 8 + min(i, tile.slots * 8 - 1); };
    float acc[2][TILES][4];
    multiply_rows<All, UNITS, TILES>(acc, (__half*)memory, (const __half*)hidden_rows, units, lane, warp, row_of);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n >= tile.slots) continue;
        const int column = (tile.first + n) * 8 + lane % 4 * 2 + i % 2, token = ((const int*)member_list)[column];
        if (token < 0) continue;
        const word over = ((const word*)over_list)[column];
        const float factor = over == 0 ? 1.0f : power(shift_of(__uint_as_float(over)));
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const int row = (rows * EACH + block * MMA_WARPS + warp) * ROWS + lane / 4 + i / 2 * 8;
          if (row >= L::H) continue;
          float sum = acc[block][n][i] * factor;
          if (L::BIASES & 4) sum += ((const float*)share_list)[column] * ((const float*)bias)[(long long)tile.expert * L::H + row];
          add(y + (long long)token * L::H + row, sum);
        }
      }
  });
}

}  // namespace moqc
#endif
