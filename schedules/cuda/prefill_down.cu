// The second grouped product (prefill.cu): down, added up for each token.
#ifndef MOQC_PREFILL_DOWN
#define MOQC_PREFILL_DOWN

namespace moqc {

// y[token][H] += down x hidden + share * bias.
template <class L, class R, class Downs, class... Tensors>
__device__ __forceinline__ void down_grouped(void* memory, const void* tile_list, const void* hit, const void* hidden_images, const void* share_list, const void* member_list, const void* over_list, const void* hidden_facts,
                                             const int* table, const void* bias, float* y, int capacity, const Tensors*... packed) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, ROWS_EACH = R::ROW_TILES * ROWS, ROW_BLOCKS = (L::H + ROWS_EACH - 1) / ROWS_EACH;
  constexpr int SLICES = UNITS < 28 ? 1 : UNITS / 14 / (3 - R::EACH);   // of columns: few experts are few tiles
  wait_for_previous_kernel();
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  const auto where = [&](int expert, int rows) {
    const int2 place = Downs::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + 2 * L::EXPERTS + expert);
    const Matrix matrix = matrix_of(Downs{}, tensors, place, (long long)ROW_TILES * UNITS);
    return [=](int number, int& row_tile) {
      row_tile = min(rows * R::ROW_TILES + number, ROW_TILES - 1);
      return matrix;
    };
  };
  const auto facts = [&](int at) {
    const word over = R::BYTES ? 0 : ((const word*)over_list)[at];
    return make_uint2(((const word*)member_list)[at], over == 0 ? 0x3f800000u : __float_as_uint(power(shift_of(__uint_as_float(over)))));
  };
  const auto finish = [&](float (&d)[128], const Tokens& tile, int rows, int slice, const uint2* known) {
#pragma unroll
    for (int atom = 0; atom < R::SLOTS; ++atom) {
      if (atom >= tile.slots) break;
      const int place = atom * 8 + lane % 4 * 2 + (lane >> 2 & 1);   // of the token that this lane writes
      const uint2 about = known[place];
      const int token = (int)about.x;
      const float factor = R::BYTES ? 1.0f : __uint_as_float(about.y) * (1 << SMALLER);
      const float share = L::BIASES & 4 ? ((const float*)share_list)[tile.first * 8 + place] : 0.0f;
#pragma unroll
      for (int block = 0; block < R::EACH; ++block) {
        const int row = rows * ROWS_EACH + group * (ROWS_EACH / R::GROUPS) + block * 64 + warp % 4 * 16 + (lane / 4 & 4) + (lane & 8);   // and the next three
        const float* results = d + 64 * block + 4 * atom;
        const float2 low = both_rows(results[0], results[1], lane), high = both_rows(results[2], results[3], lane);
        const bool upper = lane & 8;   // lanes g and g ^ 2 swap likewise: rows g & 4 to 3 more, or 8 above
        const float2 give = upper ? low : high, keep = upper ? high : low;
        const float2 got = make_float2(__shfl_xor_sync(0xffffffffu, give.x, 8), __shfl_xor_sync(0xffffffffu, give.y, 8));
        float4 sum = upper ? make_float4(got.x, got.y, keep.x, keep.y) : make_float4(keep.x, keep.y, got.x, got.y);
        if (token < 0 || (L::H % 256 != 0 && row >= L::H)) continue;
        sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
        if ((L::BIASES & 4) && slice == 0) {
          const float* b = (const float*)bias + (long long)tile.expert * L::H + row;
          sum.x += share * b[0], sum.y += share * b[1], sum.z += share * b[2], sum.w += share * b[3];
        }
        add4(y + (long long)token * L::H + row, sum);
      }
    }
  };
  grouped<R, UNITS, SLICES, ROW_BLOCKS, false>((char*)memory, tile_list, ((const int*)hit)[1] * (ROW_BLOCKS * SLICES), (const char*)hidden_images, (const char*)hidden_facts, capacity, where, facts, finish);
#endif
}

}  // namespace moqc
#endif
