// Device code of moqc's decode kernels whose warps own rows, for NVIDIA GPUs, sm_80 and later.
//
// In device.cu a warp keeps the activations of 256 columns in registers and streams row tiles past them, and a block's warps
// add up what they have. Here a block prepares the activations of one slot (an expert and up to 8 of its tokens) once, in
// shared memory, as the tensor core's operand B, and every warp takes *runs*: a pair of row tiles along the columns. The
// pair shares what is read of the activations; nothing waits for other warps until the block's end; and with 32 registers
// less a thread, a multiprocessor holds more warps, which is what hides the latencies of decoding. Where experts have more
// tokens, a block takes a tile of several slots (prefill.cu lists them), and codes are decoded once for all of them.
#ifndef MOQC_ROWS
#define MOQC_ROWS

namespace moqc {

// Geometry. A block takes PAIRS pairs of row tiles (of each projection) and UNITS units of columns, which SPLIT runs share;
// WARPS warps take the runs in turn, each with DEPTH units of both tiles on their way. TOKENS is 8 for each slot of a tile;
// with several slots a warp keeps its results (SPLIT is 1), else they meet in shared memory.
template <int WARPS_, int PAIRS_, int UNITS_, int SPLIT_, int DEPTH_, int TOKENS_> struct RowsPlan {
  static constexpr int WARPS = WARPS_, PAIRS = PAIRS_, UNITS = UNITS_, SPLIT = SPLIT_, DEPTH = DEPTH_, TOKENS = TOKENS_;
  static constexpr int THREADS = 32 * WARPS, RUN = UNITS / SPLIT, RUNS = PAIRS * SPLIT;   // RUN: units of a run; RUNS: of a matrix
  static constexpr int SLOTS = TOKENS / 8;
  static constexpr int RESULT = SLOTS == 1 ? ROWS * TOKENS : 0;   // floats of a row tile in shared memory
  static_assert(UNITS % SPLIT == 0 && (SLOTS == 1 || SPLIT == 1), "whole units");
};

// Prepared activations of one format in shared memory: operand B of each unit, and the groups' sums (see `prepare`).
template <class P, class All> struct Prepared {
  static constexpr int UNIT = All::X * 128, SUMS = All::GROUPS * 32, COUNT = P::UNITS * P::SLOTS, BYTES = COUNT * (UNIT + SUMS);
  char* memory;

  // `unit` counts those of one slot after the other.
  __device__ __forceinline__ uint4* operand(int unit, int quad, int lane) const {
    return (uint4*)(memory + unit * UNIT) + quad * 32 + lane;
  }
  __device__ __forceinline__ float2* sum(int unit, int group, int lane) const {
    return (float2*)(memory + COUNT * UNIT + unit * SUMS) + group * 4 + lane % 4;
  }
  template <class F> __device__ __forceinline__ void write(word* x, int unit, int lane) const {   // x: raw, changed
    constexpr int QUADS = Formats<F>::X / 4;
    float sums[2 * F::GROUPS];
    prepare<F>(x, sums);
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) *operand(unit, quad, lane) = make_uint4(x[4 * quad], x[4 * quad + 1], x[4 * quad + 2], x[4 * quad + 3]);
    if (lane < 4)
#pragma unroll
      for (int group = 0; group < F::GROUPS; ++group) *sum(unit, group, lane) = make_float2(sums[2 * group], sums[2 * group + 1]);
  }
};

// A pair's sums: of two row tiles, the accumulators of each slot.
template <class P> using Sums = float[2][P::SLOTS][4];

// acc += one unit of two row tiles times the activations.
template <class F, class P, class All, class W>
__device__ __forceinline__ void dot_pair(Sums<P>& acc, const W (&window)[2], int i, const Prepared<P, All>& x, int unit, int lane) {
  constexpr int STEPS = F::GROUP / 16;
  Quarter<F> quarters[2];
#pragma unroll
  for (int group = 0; group < F::GROUPS; ++group) {
    Sums<P> c;
#pragma unroll
    for (int slot = 0; slot < P::SLOTS; ++slot) {
      const float2 sum = *x.sum(slot * P::UNITS + unit, group, lane);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float(&d)[4] = c[tile][slot];
        d[0] = d[2] = sum.x, d[1] = d[3] = sum.y;
        if (!F::SYMMETRIC) {
          const word zeros = window[tile].zeros[i][group / 2];
          const float z0 = byte_value(zeros, group % 2 * 2), z8 = byte_value(zeros, group % 2 * 2 + 1);
          d[0] *= z0, d[1] *= z0, d[2] *= z8, d[3] *= z8;
        }
      }
    }
#pragma unroll
    for (int s = group * STEPS; s < (group + 1) * STEPS; s += F::CODE_BITS == 1 ? 1 : 2) {
      word operand[P::SLOTS][4];
#pragma unroll
      for (int slot = 0; slot < P::SLOTS; ++slot) {
        const uint4 b = *x.operand(slot * P::UNITS + unit, F::CODE_BITS == 1 ? s : s / 2, lane);
        operand[slot][0] = b.x, operand[slot][1] = b.y, operand[slot][2] = b.z, operand[slot][3] = b.w;
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const word* codes = quarters[tile].of(window[tile].codes[i], s / 4, s % 4 == 0);
        if constexpr (F::CODE_BITS == 1) {
#pragma unroll
          for (int slot = 0; slot < P::SLOTS; ++slot) step<1>(c[tile][slot], codes, operand[slot], s % 4);
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            word a[4];
            fragment<F::CODE_BITS>(a, codes, s % 4 + half);
#pragma unroll
            for (int slot = 0; slot < P::SLOTS; ++slot) mma(c[tile][slot], a, operand[slot][2 * half], operand[slot][2 * half + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float2 scale = __half22float2(scale_of<F>(window[tile].scales[i], group));
#pragma unroll
      for (int slot = 0; slot < P::SLOTS; ++slot)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[tile][slot][j] = fmaf(j < 2 ? scale.x : scale.y, c[tile][slot][j], acc[tile][slot][j]);
    }
  }
}

// A warp's runs 0 to count - 1. `at(run, tile)` is the first unit of one of a run's tiles, `begin(run)` the number of that
// unit in the block; `ready()` is called once the first weights are on their way, and makes the activations; `finish(run,
// sums)` takes what a run gives.
template <class F, class P, class All, class At, class Begin, class Ready, class Finish>
__device__ __forceinline__ void take_runs(const Prepared<P, All>& x, int count, int lane, At at, Begin begin, Ready ready, Finish finish) {
  Window<Formats<F>, P::DEPTH> window[2];
  Unit next[2];
  int loaded = 0, run = 0, unit = 0;
  const int total = count * P::RUN;
  const auto load = [&](int i) {
    if (loaded % P::RUN == 0) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) next[tile] = Unit::with_facts<F>(at(loaded / P::RUN, tile));
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) window[tile].load(i, next[tile]), next[tile].step(1);
    ++loaded;
  };
#pragma unroll
  for (int i = 0; i < P::DEPTH; ++i)
    if (i < total) load(i);
  ready();
  Sums<P> acc = {};
#pragma unroll 1
  for (int done = 0; done < total; done += P::DEPTH)
#pragma unroll
    for (int i = 0; i < P::DEPTH; ++i) {
      if (done + i >= total) break;
      dot_pair<F>(acc, window, i, x, begin(run) + unit, lane);
      if (loaded < total) load(i);
      if (++unit == P::RUN) {
        finish(run, acc);
#pragma unroll
        for (int j = 0; j < 8 * P::SLOTS; ++j) (&acc[0][0][0])[j] = 0.0f;
        unit = 0, ++run;
      }
    }
}

// Prepares a block's activations, a warp a unit of a slot in turn. raw(x, slot, unit) loads them and says whether any are too
// large; then shift(slot, unit) is the exponent that the lane's token needs there, and divided(x, slot, unit, shift) loads
// them once more. What a token is divided by, besides given(slot, column), is left in `factors`. write(x, number) stores them.
// All threads call this.
template <class P, class Raw, class Shift, class Divided, class Write, class Given>
__device__ __forceinline__ void prepare_block(float* factors, int warp, int lane, Raw raw, Shift shift, Divided divided, Write write, Given given) {
  word x[32];
  bool large = false;
  int* const most = (int*)factors;
  if (threadIdx.x < 8 * P::SLOTS) most[threadIdx.x] = 0;
#pragma unroll 1
  for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) large |= raw(x, i / P::UNITS, i % P::UNITS), write(x, i);
  if (__syncthreads_or(large)) {
#pragma unroll 1
    for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) atomicMax(most + i / P::UNITS * 8 + lane / 4, shift(i / P::UNITS, i % P::UNITS));
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < P::UNITS * P::SLOTS; i += P::WARPS) divided(x, i / P::UNITS, i % P::UNITS, most[i / P::UNITS * 8 + lane / 4]), write(x, i);
    __syncthreads();
  }
  if (threadIdx.x < 8 * P::SLOTS) factors[threadIdx.x] = power(most[threadIdx.x]) * given(threadIdx.x / 8, threadIdx.x % 8);
  __syncthreads();
}

// The slots of a block: all of one expert.
struct Place { int first, slots; long long expert; };

// Results of a run in shared memory, [tile][row][token].
template <class P> __device__ __forceinline__ void keep(float* result, const Sums<P>& sums, const float* factors, int lane) {
  const float2 factor = *(const float2*)(factors + lane % 4 * 2);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) store_partial<8>(result + tile * P::RESULT, sums[tile][0], factor, lane);
}

// As `gate_up` of device.cu; with several slots, `slot_list` has tiles of slots (prefill.cu) and `hit` their number behind
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

// As `down` of device.cu with blocks of one slot, or tile of slots. Grid: slots or tiles x slices of P::UNITS units of I x
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
            load_hidden_raw<L::I>(values, columns_of(slot), (first_unit + unit) * COLUMNS, true, lane);
            return (given.x | given.y | given.z | given.w) != 0;
          },
          [&](int slot, int unit) { return largest_byte(shifts_of(slot, unit)); },
          [&](word* values, int slot, int unit, int most) {
            load_hidden_raw<L::I>(values, columns_of(slot), (first_unit + unit) * COLUMNS, true, lane);
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
