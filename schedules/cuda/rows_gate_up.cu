// gate_up by warps that own rows (rows.cu).
#ifndef MOQC_ROWS_GATE_UP
#define MOQC_ROWS_GATE_UP

namespace moqc {

// As `gate_up` of decode.cu; with several slots, `slot_list` has tiles of slots (prefill.cu) and `hit` their number behind
// that of slots. Grid: slots or tiles x groups of PAIRS pairs of row tiles; P::UNITS == units of H.
template <class L, class P, bool ROUTED, class Gates, class Ups, class All, class Id, class X, class... Tensors>
__device__ __forceinline__ void gate_up_rows(void* memory, const X* x, const void* factor_list, int tokens, int top, const void* slot_list, const void* share_list, const void* member_list,
                                             const void* hit, const int* table, const void* gate_bias, const void* up_bias, void* hidden_rows,
                                             void* shift_rows, float* y, const Tensors*... packed) {
  constexpr int ROW_TILES = (L::I + ROWS - 1) / ROWS, GROUPS = (ROW_TILES + 2 * P::PAIRS - 1) / (2 * P::PAIRS);
  constexpr int PHASES = L::GATED ? 2 : 1;
  static_assert(P::UNITS == (L::H + COLUMNS - 1) / COLUMNS, "all columns");
  const float* shares = (const float*)share_list;
  const int* members = (const int*)member_list;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, item = blockIdx.x / GROUPS, tile0 = blockIdx.x % GROUPS * (2 * P::PAIRS);
  const auto wait = [] { wait_for_previous_kernel(), start_next_kernel(); };
  if (!ROUTED) wait();
  const int used = !ROUTED ? load_now((const int*)hit + (P::SLOTS > 1)) : 0;
  Place at = {item, 1, 0};
  if constexpr (P::SLOTS > 1) {
    int unused;
    const Tokens taken = take<1, P::SLOTS>(slot_list, item, unused);
    at = {taken.first, taken.slots, taken.expert};
  } else {
    at.expert = ROUTED ? (long long)expert_of<L::EXPERTS>((const Id*)slot_list, tokens * top, item, lane) : (long long)load_now((const Id*)slot_list + item);
  }
  if (!HALVES<X>)
    for (long long i = (long long)blockIdx.x * P::THREADS + threadIdx.x; i < (long long)tokens * L::H; i += (long long)gridDim.x * P::THREADS) y[i] = 0.0f;
  if (ROUTED && at.expert < 0) wait();   // not to end before the kernel ahead
  if (ROUTED ? at.expert < 0 : item >= used) return;
  const void* const tensors[] = {packed...};
  constexpr int CLASSES = largest(Gates::COUNT, Ups::COUNT);
  const int2 second_place = find<CLASSES, L::EXPERTS>(table + 2 * L::EXPERTS, at.expert, lane);
  const int2 first_place = L::GATED ? find<CLASSES, L::EXPERTS>(table, at.expert, lane) : second_place;
  if (at.expert < 0 || at.expert >= L::EXPERTS) return;
  const long long matrix = (long long)ROW_TILES * P::UNITS;
  const Unit up = locate(Ups{}, tensors + 3 * Gates::COUNT, second_place, matrix, 0, lane);
  Unit gate = up;
  if constexpr (L::GATED) gate = locate(Gates{}, tensors, first_place, matrix, 0, lane);
  const bool same = All::COUNT == 1 || gate.id == up.id;
  float* const factors = (float*)memory;
  float* const results = factors + 8 * P::SLOTS;
  char* const prepared = (char*)(results + PHASES * P::RUNS * 2 * P::RESULT);
  const Prepared<P, All> of_gate{prepared}, of_up{prepared + (same ? 0 : Prepared<P, All>::BYTES)};
  const auto token_of = [&](int slot, int column) { return slot < at.slots ? members[(at.first + slot) * 8 + column] : -1; };
  const auto ready = [&] {
    if (ROUTED) wait();
    prepare_block<P>(
        factors, warp, lane,
        [&](word* values, int slot, int unit) {
          const int t = token_of(slot, lane / 4);
          if constexpr (HALVES<X>) {
            load_halves(values, (const __half*)x + (long long)t * (P::UNITS * COLUMNS), unit * COLUMNS, t >= 0, lane);
            return false;
          } else {
            return load_raw<L::H>(values, x + (long long)t * L::H, unit * COLUMNS, t >= 0, lane);
          }
        },
        [&](int slot, int unit) {
          const int t = token_of(slot, lane / 4);
          if constexpr (HALVES<X>) return 0;
          else return shift_in<L::H>(x + (long long)t * L::H, unit * COLUMNS, t >= 0, lane);
        },
        [&](word* values, int slot, int unit, int shift) {
          const int t = token_of(slot, lane / 4);
          if constexpr (!HALVES<X>) load_divided<L::H>(values, x + (long long)t * L::H, unit * COLUMNS, t >= 0, lane, shift);
        },
        [&](word* values, int unit) {
          word again[Formats<Format<1, 128, true, false>>::X];
          if (!same) {
#pragma unroll
            for (int i = 0; i < 32; ++i) again[i] = values[i];
            with_format(All{}, up.id, [&](auto format) { of_up.template write<decltype(format)>(again, unit, lane); });
          }
#pragma unroll
          for (int i = 0; i < 32; ++i) again[i] = values[i];
          with_format(All{}, gate.id, [&](auto format) { of_gate.template write<decltype(format)>(again, unit, lane); });
        },
        [&](int slot, int column) {
          const int t = token_of(slot, column);
          return HALVES<X> && t >= 0 ? ((const float*)factor_list)[t] : 1.0f;
        });
  };
  const auto unit_of = [&](const Unit& of, int run, int number) {   // `run` of this matrix' RUNS
    Unit unit = of;
    unit.step(min(tile0 + run / P::SPLIT * 2 + number, ROW_TILES - 1) * P::UNITS + run % P::SPLIT * P::RUN);
    return unit;
  };
  const auto activate = [&](long long line, int out, float g, float u) {
    const bool inside = L::I % ROWS == 0 || out < L::I;
    if (!L::GATED) u = g;
    if ((L::BIASES & 1) && inside) g += ((const float*)gate_bias)[at.expert * L::I + out];
    if ((L::BIASES & 2) && inside) u += ((const float*)up_bias)[at.expert * L::I + out];
    const float share = shares[line];
    return share == 0.0f || !inside ? 0.0f : share * L::Activation::of(g, u);
  };
  __half* hidden = (__half*)hidden_rows;
  unsigned char* shifts = (unsigned char*)shift_rows;
  if constexpr (P::SLOTS > 1) {   // a pair's gate and up by one warp, one after the other
    const int count = max((P::PAIRS - warp + P::WARPS - 1) / P::WARPS, 0);
    Sums<P> gates;
    const auto run_all = [&](auto first_format, auto take_both) {
      using F = decltype(first_format);
      take_runs<F>(
          of_up, PHASES * count, lane,
          [&](int run, int number) { return unit_of(PHASES == 2 && run % 2 == 0 ? gate : up, warp + run / PHASES * P::WARPS, number); },
          [](int) { return 0; }, ready,
          [&](int run, const Sums<P>& sums) {
            if (PHASES == 1 || run % 2 == 0) {
#pragma unroll
              for (int j = 0; j < 8 * P::SLOTS; ++j) (&gates[0][0][0])[j] = (&sums[0][0][0])[j];
            }
            if (PHASES == 1 || run % 2 == 1) take_both(warp + run / PHASES * P::WARPS, gates, sums);
          });
    };
    static_assert(All::COUNT == 1, "one format");
    with_format(All{}, up.id, [&](auto format) {
      run_all(format, [&](int pair, const Sums<P>& first, const Sums<P>& second) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int row_tile = tile0 + pair * 2 + tile;
          if (row_tile >= ROW_TILES) break;
#pragma unroll
          for (int slot = 0; slot < P::SLOTS; ++slot) {
            if (slot >= at.slots) break;
#pragma unroll
            for (int column = 0; column < 2; ++column) {
              const long long line = (long long)(at.first + slot) * 8 + lane % 4 * 2 + column;
              const float by = SCALE * factors[slot * 8 + lane % 4 * 2 + column];
              float value[2];
#pragma unroll
              for (int i = 0; i < 2; ++i)
                value[i] = activate(line, row_tile * ROWS + lane / 4 + 8 * i, first[tile][slot][2 * i + column] * by, second[tile][slot][2 * i + column] * by);
              float most = fmaxf(fabsf(value[0]), fabsf(value[1]));
              int shift = 0;
              if (__any_sync(0xffffffffu, most >= LIMIT)) {
#pragma unroll
                for (int other = 4; other < 32; other *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
                shift = shift_of(most);
              }
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int out = row_tile * ROWS + lane / 4 + 8 * i;
                if (L::I % ROWS == 0 || out < L::I) hidden[line * L::I + out] = __float2half(value[i] * power(-shift));
              }
              if (lane / 4 == 0) shifts[line * L::SHIFTS + row_tile] = (unsigned char)shift;
            }
          }
        }
      });
    });
  } else {
    const auto begin = [&](int run) { return (warp + run * P::WARPS) % P::SPLIT * P::RUN; };
    const auto keeper = [&](int base) { return [=](int run, const Sums<P>& sums) { keep<P>(results + (base + warp + run * P::WARPS) * 2 * P::RESULT, sums, factors, lane); }; };
    const auto share_of = [&](int runs) { return max((runs - warp + P::WARPS - 1) / P::WARPS, 0); };
    if (same) {
      with_format(All{}, up.id, [&](auto format) {
        const auto either = [&](int run, int number) {
          run = warp + run * P::WARPS;
          return unit_of(PHASES == 2 && run < P::RUNS ? gate : up, run % P::RUNS, number);
        };
        take_runs<decltype(format)>(of_up, share_of(PHASES * P::RUNS), lane, either, begin, ready, keeper(0));
      });
    } else {
      const auto of = [&](const Unit& matrix) { return [&](int run, int number) { return unit_of(matrix, warp + run * P::WARPS, number); }; };
      with_format(All{}, gate.id, [&](auto format) { take_runs<decltype(format)>(of_gate, share_of(P::RUNS), lane, of(gate), begin, ready, keeper(0)); });
      with_format(All{}, up.id, [&](auto format) { take_runs<decltype(format)>(of_up, share_of(P::RUNS), lane, of(up), begin, [] {}, keeper(P::RUNS)); });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * P::PAIRS * ROWS * P::TOKENS; i += P::THREADS) {
      const int t = i / (ROWS * P::TOKENS), r = i % ROWS, column = i / ROWS % P::TOKENS, out = (tile0 + t) * ROWS + r;
      if (tile0 + t >= ROW_TILES) break;
      const float* result = results + (t / 2 * P::SPLIT * 2 + t % 2) * P::RESULT + place<8>(r, column);
      float g = 0.0f, u = 0.0f;
#pragma unroll
      for (int part = 0; part < P::SPLIT; ++part) {
        g += result[part * 2 * P::RESULT] * SCALE;
        if (L::GATED) u += result[(P::RUNS + part) * 2 * P::RESULT] * SCALE;
      }
      const long long line = (long long)item * P::TOKENS + column;
      store_hidden<L>(hidden, shifts, line, out, L::I % ROWS == 0 || out < L::I, activate(line, out, g, u), lane);
    }
  }
}

}  // namespace moqc
#endif
