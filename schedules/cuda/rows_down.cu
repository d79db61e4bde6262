// down by warps that own rows (rows.cu).
#ifndef MOQC_ROWS_DOWN
#define MOQC_ROWS_DOWN

namespace moqc {

// As `down` of decode.cu with blocks of one slot, or tile of slots. Grid: slots or tiles x slices of P::UNITS units of I x
// groups of PAIRS pairs of row tiles of H.
template <class L, class P, class Downs, class All, class Id, class... Tensors>
__device__ __forceinline__ void down_rows(void* memory, const void* hidden, const void* shifts, int tokens, const void* slot_list, const void* share_list,
                                          const void* member_list, const void* hit, int top, const int* table, const void* bias, float* y,
                                          const Tensors*... packed) {
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, GROUPS = (ROW_TILES + 2 * P::PAIRS - 1) / (2 * P::PAIRS);
  constexpr int SLICES = UNITS / P::UNITS;
  static_assert(UNITS % P::UNITS == 0, "whole slices");
  const float* shares = (const float*)share_list;
  const int* members = (const int*)member_list;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile0 = blockIdx.x % GROUPS * (2 * P::PAIRS);
  const int slice = blockIdx.x / GROUPS % SLICES, item = blockIdx.x / GROUPS / SLICES, first_unit = slice * P::UNITS;
  start_next_kernel();
  const int used = load_now((const int*)hit + (P::SLOTS > 1));
  Place at = {item, 1, 0};
  if constexpr (P::SLOTS > 1) {
    int unused;
    const Tokens taken = take<1, P::SLOTS>(slot_list, item, unused);
    at = {taken.first, taken.slots, taken.expert};
  } else {
    at.expert = load_now((const Id*)slot_list + item);
  }
  if (item >= used) return;
  const void* const tensors[] = {packed...};
  const int2 place_of = find<Downs::COUNT, L::EXPERTS>(table + 4 * L::EXPERTS, at.expert, lane);
  if (at.expert < 0 || at.expert >= L::EXPERTS) return;
  const Unit matrix = locate(Downs{}, tensors, place_of, (long long)ROW_TILES * UNITS, first_unit, lane);
  float* const factors = (float*)memory;
  float* const results = factors + 8 * P::SLOTS;
  const Prepared<P, All> prepared{(char*)(results + P::RUNS * 2 * P::RESULT)};
  const auto line_of = [&](int slot) { return (long long)(at.first + min(slot, at.slots - 1)) * 8 + lane / 4; };
  const auto columns_of = [&](int slot) { return (const __half*)hidden + line_of(slot) * L::I; };
  const auto shifts_of = [&](int slot, int unit) { return load_shifts<L::I>((const unsigned char*)shifts + line_of(slot) * L::SHIFTS, (first_unit + unit) * COLUMNS, true); };
  const auto unit_of = [&](int run, int number) {
    run = warp + run * P::WARPS;
    Unit unit = matrix;
    unit.step(min(tile0 + run / P::SPLIT * 2 + number, ROW_TILES - 1) * UNITS + run % P::SPLIT * P::RUN);
    return unit;
  };
  const auto give = [&](int slot, int column, int out, float sum) {
    const int line = (at.first + slot) * 8 + column, token = members[line];
    if (token < 0 || token >= tokens || (L::H % ROWS != 0 && out >= L::H)) return;
    if ((L::BIASES & 4) && slice == 0) sum += shares[line] * ((const float*)bias)[at.expert * L::H + out];
    add(y + (long long)token * L::H + out, sum);
  };
  with_format(All{}, matrix.id, [&](auto format) {
    using F = decltype(format);
    const auto ready = [&] {
      wait_for_previous_kernel();
      prepare_block<P>(
          factors, warp, lane,
          [&](word* values, int slot, int unit) {
            const uint4 given = shifts_of(slot, unit);
            load_chunks<L::I>(values, columns_of(slot), (first_unit + unit) * COLUMNS, true, lane);
            return (given.x | given.y | given.z | given.w) != 0;
          },
          [&](int slot, int unit) { return largest_byte(shifts_of(slot, unit)); },
          [&](word* values, int slot, int unit, int most) {
            load_chunks<L::I>(values, columns_of(slot), (first_unit + unit) * COLUMNS, true, lane);
            apply_shifts(values, shifts_of(slot, unit), most, lane);
          },
          [&](word* values, int unit) {
            word room[Formats<F>::X];
#pragma unroll
            for (int i = 0; i < 32; ++i) room[i] = values[i];
            prepared.template write<F>(room, unit, lane);
          },
          [](int, int) { return 1.0f; });
    };
    const int count = max((P::RUNS - warp + P::WARPS - 1) / P::WARPS, 0);
    take_runs<F>(
        prepared, count, lane, unit_of, [&](int run) { return (warp + run * P::WARPS) % P::SPLIT * P::RUN; }, ready,
        [&](int run, const Sums<P>& sums) {
          run = warp + run * P::WARPS;
          if constexpr (P::SLOTS == 1) {
            keep<P>(results + run * 2 * P::RESULT, sums, factors, lane);
          } else {
#pragma unroll
            for (int i = 0; i < 8 * P::SLOTS; ++i) {
              const int tile = i / (4 * P::SLOTS), slot = i / 4 % P::SLOTS, row = lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i % 2;
              if (slot >= at.slots || tile0 + run * 2 + tile >= ROW_TILES) continue;
              give(slot, column, (tile0 + run * 2 + tile) * ROWS + row, sums[tile][slot][i % 4] * (SCALE * factors[slot * 8 + column]));
            }
          }
        });
  });
  if constexpr (P::SLOTS == 1) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * P::PAIRS * ROWS * P::TOKENS; i += P::THREADS) {
      const int t = i / (ROWS * P::TOKENS), r = i % ROWS, c = i / ROWS % P::TOKENS;
      if (tile0 + t >= ROW_TILES) break;
      const float* result = results + (t / 2 * P::SPLIT * 2 + t % 2) * P::RESULT + place<8>(r, c);
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < P::SPLIT; ++part) sum += result[part * 2 * P::RESULT];
      give(0, c, (tile0 + t) * ROWS + r, sum * SCALE);
    }
  }
}

}  // namespace moqc
#endif
