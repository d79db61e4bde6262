// The two products of moqc's int8 decode kernels for 2 and more tokens (quad_blocks.cu), for NVIDIA GPUs, sm_80 and later.
#ifndef MOQC_QUADS_LAYER
#define MOQC_QUADS_LAYER

namespace moqc::quads {

// Shared memory of a block: its pairs, the weights of a pass' tokens, results that meet, activations of one format or two.
template <class P, class M, class All, int MATRICES> struct Memory {
  static constexpr int SHARES = M::BYTES, RESULTS = SHARES + 4 * P::TOKENS, PREPARED = RESULTS + MATRICES * P::RUNS * 2 * P::RESULT * 4;
  char* memory;

  __device__ __forceinline__ M members() const { return {memory}; }
  __device__ __forceinline__ float* shares() const { return (float*)(memory + SHARES); }
  __device__ __forceinline__ float* result(int run) const { return (float*)(memory + RESULTS) + run * 2 * P::RESULT; }
  __device__ __forceinline__ Activations<P, All> prepared(int number) const { return {memory + PREPARED + number * Activations<P, All>::BYTES}; }
};

// hidden[pair][I] = weight * act(gate x + bias, up x + bias) in fp16 for the router's pairs of up to MOST tokens, with `shifts` (see
// load_hidden); y [tokens][H] is set to 0 for `down` to add to. Grid: the most experts that may be hit x groups of PAIRS pairs
// of row tiles; P::UNITS == units of H.
template <class L, class P, int TOP, int MOST, class Gates, class Ups, class All, class Id, class X, class... Tensors>
__device__ __forceinline__ void gate_up(void* memory, const X* x, const void* id_list, const float* weights, int tokens, const int* table, const void* gate_bias, const void* up_bias,
                                             void* hidden_rows, void* shift_rows, float* y, const Tensors*... packed) {
  constexpr int ROW_TILES = (L::I + ROWS - 1) / ROWS, GROUPS = (ROW_TILES + 2 * P::PAIRS - 1) / (2 * P::PAIRS), PHASES = L::GATED ? 2 : 1;
  static_assert(P::UNITS == (L::H + COLUMNS - 1) / COLUMNS, "all columns");
  const Memory<P, Members<L::EXPERTS, TOP, MOST>, All, PHASES> block{(char*)memory};
  const auto members = block.members();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile0 = blockIdx.x % GROUPS * (2 * P::PAIRS);
  wait_for_previous_kernel(), start_next_kernel();
  const int expert = members.template find<P::THREADS>((const Id*)id_list, tokens, blockIdx.x / GROUPS, lane);
  for (long long i = (long long)blockIdx.x * P::THREADS + threadIdx.x; i < (long long)tokens * L::H; i += (long long)gridDim.x * P::THREADS) y[i] = 0.0f;
  if (expert < 0) return;
  const void* const tensors[] = {packed...};
  constexpr int CLASSES = largest(Gates::COUNT, Ups::COUNT);
  const int2 second_place = find<CLASSES, L::EXPERTS>(table + 2 * L::EXPERTS, expert, lane);
  const int2 first_place = L::GATED ? find<CLASSES, L::EXPERTS>(table, expert, lane) : second_place;
  const long long matrix = (long long)ROW_TILES * P::UNITS;
  const Unit up = locate(Ups{}, tensors + 3 * Gates::COUNT, second_place, matrix, 0, lane);
  Unit gate = up;
  if constexpr (L::GATED) gate = locate(Gates{}, tensors, first_place, matrix, 0, lane);
  const bool same = All::COUNT == 1 || gate.id == up.id;
  const auto of_gate = block.prepared(0), of_up = block.prepared(same ? 0 : 1);
  int first = 0, places = 0;   // of this pass
  const auto quads = [&] { return (places + 3) / 4; };
  const auto ready = [&] {
    if (threadIdx.x < places) block.shares()[threadIdx.x] = load_now(weights + members.pairs()[first + threadIdx.x]);
    prepare_block<P>(
        places, warp, [&](float (&values)[8], int place, int unit) { load_eight<L::H>(values, x + (long long)(members.pairs()[first + place] / TOP) * L::H, unit * COLUMNS, lane); },
        [&](const float (&values)[8], int place, int unit) {
          with_format(All{}, gate.id, [&](auto format) { of_gate.template write<decltype(format)>(values, unit, place, lane); });
          if (!same) with_format(All{}, up.id, [&](auto format) { of_up.template write<decltype(format)>(values, unit, place, lane); });
        });
    return quads();
  };
  const auto unit_of = [&](const Unit& of, int run, int number) {   // `run` of this matrix' RUNS
    Unit unit = of;
    unit.step(min(tile0 + run / P::SPLIT * 2 + number, ROW_TILES - 1) * P::UNITS + run % P::SPLIT * P::RUN);
    return unit;
  };
  const auto activate = [&](int place, int out, float g, float u) {
    const bool inside = L::I % ROWS == 0 || out < L::I;
    if (!L::GATED) u = g;
    if ((L::BIASES & 1) && inside) g += ((const float*)gate_bias)[(long long)expert * L::I + out];
    if ((L::BIASES & 2) && inside) u += ((const float*)up_bias)[(long long)expert * L::I + out];
    return inside ? block.shares()[place] * L::Activation::of(g, u) : 0.0f;
  };
  __half* hidden = (__half*)hidden_rows;
  unsigned char* shifts = (unsigned char*)shift_rows;
  const auto share_of = [&](int runs) { return max((runs - warp + P::WARPS - 1) / P::WARPS, 0); };
  const int columns = *members.count();
#pragma unroll 1
  for (; first < columns; first += P::TOKENS) {
    places = min(columns - first, P::TOKENS);
    const auto begin = [&](int run) { return (warp + run * P::WARPS) % P::SPLIT * P::RUN; };
    const auto keeper = [&](int base) { return [=](int run, const Sums& sums, auto count) { keep<P, count.VALUE>(block.result(base + warp + run * P::WARPS), sums, lane); }; };
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
      with_format(All{}, up.id, [&](auto format) { take_runs<decltype(format)>(of_up, share_of(P::RUNS), lane, of(up), begin, quads, keeper(P::RUNS)); });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * P::PAIRS * ROWS * places; i += P::THREADS) {
      const int t = i / ROWS % (2 * P::PAIRS), r = i % ROWS, column = i / (2 * P::PAIRS * ROWS), out = (tile0 + t) * ROWS + r;
      if (tile0 + t >= ROW_TILES) continue;
      const float* result = block.result(t / 2 * P::SPLIT) + t % 2 * P::RESULT + place<8>(r, column);
      float g = 0.0f, u = 0.0f;
#pragma unroll
      for (int part = 0; part < P::SPLIT; ++part) {
        g += result[part * 2 * P::RESULT] * SCALE;
        if (L::GATED) u += result[(P::RUNS + part) * 2 * P::RESULT] * SCALE;
      }
      store_hidden<L>(hidden, shifts, members.pairs()[first + column], out, L::I % ROWS == 0 || out < L::I, activate(column, out, g, u), lane);
    }
    __syncthreads();   // before weights and activations are overwritten
  }
}

// y[token][H] += down x hidden + weight * bias over the router's pairs, as above. Grid: the most experts that may be hit x slices of
// P::UNITS units of I x groups of PAIRS pairs of row tiles of H.
template <class L, class P, int TOP, int MOST, class Downs, class All, class Id, class... Tensors>
__device__ __forceinline__ void down(void* memory, const void* hidden, const void* shifts, const void* id_list, const float* weights, int tokens, const int* table, const void* bias,
                                          float* y, const Tensors*... packed) {
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, GROUPS = (ROW_TILES + 2 * P::PAIRS - 1) / (2 * P::PAIRS);
  constexpr int SLICES = UNITS / P::UNITS;
  static_assert(UNITS % P::UNITS == 0, "whole slices");
  const Memory<P, Members<L::EXPERTS, TOP, MOST>, All, 1> block{(char*)memory};
  const auto members = block.members();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile0 = blockIdx.x % GROUPS * (2 * P::PAIRS);
  const int slice = blockIdx.x / GROUPS % SLICES, first_unit = slice * P::UNITS;
  start_next_kernel();
  const int expert = members.template find<P::THREADS>((const Id*)id_list, tokens, blockIdx.x / GROUPS / SLICES, lane);
  if (expert < 0) return;
  const void* const tensors[] = {packed...};
  const int2 class_of = find<Downs::COUNT, L::EXPERTS>(table + 4 * L::EXPERTS, expert, lane);
  const Unit matrix = locate(Downs{}, tensors, class_of, (long long)ROW_TILES * UNITS, first_unit, lane);
  const auto prepared = block.prepared(0);
  const auto unit_of = [&](int run, int number) {
    run = warp + run * P::WARPS;
    Unit unit = matrix;
    unit.step(min(tile0 + run / P::SPLIT * 2 + number, ROW_TILES - 1) * UNITS + run % P::SPLIT * P::RUN);
    return unit;
  };
  const int columns = *members.count(), count = max((P::RUNS - warp + P::WARPS - 1) / P::WARPS, 0);
#pragma unroll 1
  for (int first = 0; first < columns; first += P::TOKENS) {
    const int places = min(columns - first, P::TOKENS);
    const auto give = [&](int place, int out, float sum) {
      if (L::H % ROWS != 0 && out >= L::H) return;
      const int pair = members.pairs()[first + place];
      if ((L::BIASES & 4) && slice == 0) sum += weights[pair] * ((const float*)bias)[(long long)expert * L::H + out];
      add(y + (long long)(pair / TOP) * L::H + out, sum);
    };
    with_format(All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      const auto ready = [&] {
        wait_for_previous_kernel();
        prepare_block<P>(
            places, warp,
            [&](float (&values)[8], int place, int unit) {
              const long long line = members.pairs()[first + place];
              load_hidden_eight<L::I>(values, (const __half*)hidden + line * L::I, (const unsigned char*)shifts + line * L::SHIFTS, (first_unit + unit) * COLUMNS, lane);
            },
            [&](const float (&values)[8], int place, int unit) { prepared.template write<F>(values, unit, place, lane); });
        return (places + 3) / 4;
      };
      take_runs<F>(
          prepared, count, lane, unit_of, [&](int run) { return (warp + run * P::WARPS) % P::SPLIT * P::RUN; }, ready,
          [&](int run, const Sums& sums, auto count) { keep<P, count.VALUE>(block.result(warp + run * P::WARPS), sums, lane); });
    });
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * P::PAIRS * ROWS * places; i += P::THREADS) {
      const int t = i / ROWS % (2 * P::PAIRS), r = i % ROWS, c = i / (2 * P::PAIRS * ROWS);
      if (tile0 + t >= ROW_TILES) continue;
      const float* result = block.result(t / 2 * P::SPLIT) + t % 2 * P::RESULT + place<8>(r, c);
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < P::SPLIT; ++part) sum += result[part * 2 * P::RESULT];
      give(c, (tile0 + t) * ROWS + r, sum * SCALE);
    }
  }
}

}  // namespace moqc::quads
#endif
