// The two products of moqc's int8 decode kernels for 2 and more tokens (quad_blocks.cu), for NVIDIA GPUs, sm_80 and later.
#ifndef MOQC_QUADS_LAYER
#define MOQC_QUADS_LAYER

namespace moqc::quads {

// Shared memory of a block: its choices, the weights of a round's tokens, results that meet, activations of one format or two.
template <class P, class C, class All, int MATRICES> struct Memory {
  static constexpr int SHARES = C::BYTES, RESULTS = SHARES + 4 * P::TOKENS, PREPARED = RESULTS + MATRICES * P::PAIRS * P::SPLIT * result_floats<2>() * 4;
  char* memory;

  __device__ __forceinline__ C choices() const { return {memory}; }
  __device__ __forceinline__ float* shares() const { return (float*)(memory + SHARES); }
  template <int QUADS> __device__ __forceinline__ float* result(int run) const { return (float*)(memory + RESULTS) + run * result_floats<QUADS>(); }
  __device__ __forceinline__ Activations<P, All> prepared(int number) const { return {memory + PREPARED + number * Activations<P, All>::BYTES}; }
  // Of a round's results: a row of a row tile of `pair` for one of its tokens, over all parts; `first` is the matrix' first run.
  template <int QUADS> __device__ __forceinline__ float sum(int first, int pair, int tile, int row, int column) const {
    const float* const part = result<QUADS>(first + pair * P::SPLIT) + result_place<QUADS>(tile, row, column);
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < P::SPLIT; ++i) all += part[i * result_floats<QUADS>()];
    return all * SCALE;
  }
  __device__ __forceinline__ float sum(int quads, int first, int pair, int tile, int row, int column) const {
    return quads == 1 ? sum<1>(first, pair, tile, row, column) : sum<2>(first, pair, tile, row, column);
  }
};

// body(pair, tile 0 or 1, row, place, column) for all that a round gives; 16 lanes together have a row tile of one token.
template <class P, class Body> __device__ __forceinline__ void for_results(const Round& round, Body body) {
  const int tiles = 2 * round.pairs(), total = tiles * ROWS * round.columns();
  for (int i = threadIdx.x; i < total; i += P::THREADS) {
    const int column = i / ROWS / tiles, t = i / ROWS - column * tiles;
    const bool second = round.in_second(t / 2);
    if (column < (second ? round.second.places : round.first.places)) body(t / 2, t % 2, i % ROWS, (second ? 4 : 0) + column, column);
  }
}

// hidden[pair][I] = weight * act(gate x + bias, up x + bias) in fp16 for the router's pairs of up to MOST tokens, with `shifts` (see
// load_hidden); y [tokens][H] is set to 0 for `down` to add to. Any number of blocks; P::UNITS == units of H.
template <class L, class P, int TOP, int MOST, class Gates, class Ups, class All, class Id, class X, class... Tensors>
__device__ __forceinline__ void gate_up(void* memory, const X* x, const void* id_list, const float* weights, int tokens, const int* table, const void* gate_bias, const void* up_bias,
                                             void* hidden_rows, void* shift_rows, float* y, const Tensors*... packed) {
  constexpr int ROW_TILES = (L::I + ROWS - 1) / ROWS, PHASES = L::GATED ? 2 : 1;
  constexpr bool ONE_CLASS = Ups::COUNT == 1 && Gates::COUNT <= 1 && All::COUNT == 1;
  static_assert(P::UNITS == (L::H + COLUMNS - 1) / COLUMNS, "all columns");
  using C = Choices<L::EXPERTS, TOP, MOST, P::TOKENS>;
  const Memory<P, C, All, PHASES> block{(char*)memory};
  const C choices = block.choices();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_previous_kernel(), start_next_kernel();
  choices.template read<P::THREADS>((const Id*)id_list, tokens, [&] {
#pragma unroll 1
    for (int i = blockIdx.x * P::THREADS + threadIdx.x; i < tokens * L::H; i += gridDim.x * P::THREADS) y[i] = 0.0f;
  });
  const void* const tensors[] = {packed...};
  constexpr int CLASSES = largest(Gates::COUNT, Ups::COUNT), MATRIX = ROW_TILES * P::UNITS;
  Share<C, (ROW_TILES + 1) / 2, 1> share(choices, lane);
#pragma unroll 1
  for (;;) {
    const Round round = share.template next<ONE_CLASS && P::QUADS == 2>(P::PAIRS);
    if (round.first.count == 0) return;
    const int2 second_place = find<CLASSES, L::EXPERTS>(table + 2 * L::EXPERTS, round.first.expert, lane);
    const int2 first_place = L::GATED ? find<CLASSES, L::EXPERTS>(table, round.first.expert, lane) : second_place;
    const Unit up = locate(Ups{}, tensors + 3 * Gates::COUNT, second_place, MATRIX, 0, lane);
    Unit gate = up;
    if constexpr (L::GATED) gate = locate(Gates{}, tensors, first_place, MATRIX, 0, lane);
    const bool same = All::COUNT == 1 || gate.id == up.id;
    const auto of_gate = block.prepared(0), of_up = block.prepared(same ? 0 : 1);
    const int runs = round.pairs() * P::SPLIT, jump = (round.second.expert - round.first.expert) * MATRIX;
    const auto ready = [&] {
      if (warp == 0) choices.list(round.first, 0, tokens, lane);
      if (warp == P::WARPS - 1 && round.second.count > 0) choices.list(round.second, 4, tokens, lane);
      __syncthreads();
      if (threadIdx.x < round.places()) block.shares()[round.place(threadIdx.x)] = load_now(weights + choices.chosen()[round.place(threadIdx.x)]);
      prepare_round<P>(
          round, warp, [&](float (&values)[8], int place, int unit) { load_eight<L::H>(values, x + (long long)(choices.chosen()[place] / TOP) * L::H, unit * COLUMNS, lane); },
          [&](const float (&values)[8], int place, int unit) {
            with_format(All{}, gate.id, [&](auto format) { of_gate.template write<decltype(format)>(values, unit, place, lane); });
            if (!same) with_format(All{}, up.id, [&](auto format) { of_up.template write<decltype(format)>(values, unit, place, lane); });
          });
      return round.quads();
    };
    const auto unit_of = [&](const Unit& of, int run) {   // `run` of this matrix'
      return moved(of, round.tile(run / P::SPLIT) * P::UNITS + run % P::SPLIT + (round.in_second(run / P::SPLIT) ? jump : 0));
    };
    const auto apart_of = [&](int run) { return round.tile(run / P::SPLIT) + 1 < ROW_TILES || ROW_TILES % 2 == 0 ? P::UNITS : 0; };
    const auto begin_of = [&](int run) { return run % P::SPLIT + (round.in_second(run / P::SPLIT) ? P::UNITS : 0); };
    const auto share_of = [&](int all) { return max((all - warp + P::WARPS - 1) / P::WARPS, 0); };
    const auto keeper = [&](int base) { return [=](int run, const Sums& sums, auto count) { keep<count.VALUE>(block.template result<count.VALUE>(base + warp + run * P::WARPS), sums, lane); }; };
    if (same) {
      const auto of_matrix = [&](int run) { return run < runs || PHASES == 1 ? run : run - runs; };
      with_format(All{}, up.id, [&](auto format) {
        take_runs<decltype(format)>(
            of_up, share_of(PHASES * runs), lane,
            [&](int run) {
              run = warp + run * P::WARPS;
              return unit_of(PHASES == 2 && run < runs ? gate : up, of_matrix(run));
            },
            [&](int run) { return apart_of(of_matrix(warp + run * P::WARPS)); },
            [&](int run) { return begin_of(of_matrix(warp + run * P::WARPS)); }, ready, keeper(0));
      });
    } else {
      const auto of = [&](const Unit& matrix) { return [&](int run) { return unit_of(matrix, warp + run * P::WARPS); }; };
      const auto apart = [&](int run) { return apart_of(warp + run * P::WARPS); };
      const auto begin = [&](int run) { return begin_of(warp + run * P::WARPS); };
      with_format(All{}, gate.id, [&](auto format) { take_runs<decltype(format)>(of_gate, share_of(runs), lane, of(gate), apart, begin, ready, keeper(0)); });
      with_format(All{}, up.id, [&](auto format) { take_runs<decltype(format)>(of_up, share_of(runs), lane, of(up), apart, begin, [&] { return round.quads(); }, keeper(runs)); });
    }
    __syncthreads();
    for_results<P>(round, [&](int pair, int tile, int row, int place, int column) {
      const int row_tile = round.tile(pair) + tile, out = row_tile * ROWS + row;
      if (row_tile >= ROW_TILES) return;
      const bool inside = L::I % ROWS == 0 || out < L::I;
      const long long expert = round.in_second(pair) ? round.second.expert : round.first.expert;
      float g = block.sum(round.quads(), 0, pair, tile, row, column), u = L::GATED ? block.sum(round.quads(), runs, pair, tile, row, column) : g;
      if ((L::BIASES & 1) && inside) g += ((const float*)gate_bias)[expert * L::I + out];
      if ((L::BIASES & 2) && inside) u += ((const float*)up_bias)[expert * L::I + out];
      const float value = inside ? block.shares()[place] * L::Activation::of(g, u) : 0.0f;
      store_hidden<L>((__half*)hidden_rows, (unsigned char*)shift_rows, choices.chosen()[place], out, inside, value, lane);
    });
    __syncthreads();   // before weights and activations are overwritten
  }
}

// y[token][H] += down x hidden + weight * bias over the router's pairs, as above; P::UNITS are those of a slice of the columns.
template <class L, class P, int TOP, int MOST, class Downs, class All, class Id, class... Tensors>
__device__ __forceinline__ void down(void* memory, const void* hidden, const void* shifts, const void* id_list, const float* weights, int tokens, const int* table, const void* bias,
                                          float* y, const Tensors*... packed) {
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, SLICES = UNITS / P::UNITS;
  constexpr bool ONE_CLASS = Downs::COUNT == 1 && All::COUNT == 1;
  static_assert(UNITS % P::UNITS == 0, "whole slices");
  using C = Choices<L::EXPERTS, TOP, MOST, P::TOKENS>;
  const Memory<P, C, All, 1> block{(char*)memory};
  const C choices = block.choices();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  start_next_kernel();
  choices.template read<P::THREADS>((const Id*)id_list, tokens, [] {});
  const void* const tensors[] = {packed...};
  Share<C, (ROW_TILES + 1) / 2, SLICES> share(choices, lane);
#pragma unroll 1
  for (;;) {
    const Round round = share.template next<ONE_CLASS && P::QUADS == 2>(P::PAIRS);
    if (round.first.count == 0) break;
    const int2 class_of = find<Downs::COUNT, L::EXPERTS>(table + 4 * L::EXPERTS, round.first.expert, lane);
    const Unit matrix = locate(Downs{}, tensors, class_of, (long long)ROW_TILES * UNITS, round.first.slice * P::UNITS, lane);
    const auto prepared = block.prepared(0);
    const int runs = round.pairs() * P::SPLIT;
    const int jump = (round.second.expert - round.first.expert) * (ROW_TILES * UNITS) + (round.second.slice - round.first.slice) * P::UNITS;
    const auto unit_of = [&](int run) {
      run = warp + run * P::WARPS;
      return moved(matrix, round.tile(run / P::SPLIT) * UNITS + run % P::SPLIT + (round.in_second(run / P::SPLIT) ? jump : 0));
    };
    const auto apart = [&](int run) { return round.tile((warp + run * P::WARPS) / P::SPLIT) + 1 < ROW_TILES || ROW_TILES % 2 == 0 ? UNITS : 0; };
    const auto begin = [&](int run) {
      run = warp + run * P::WARPS;
      return run % P::SPLIT + (round.in_second(run / P::SPLIT) ? P::UNITS : 0);
    };
    with_format(All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      const auto ready = [&] {
        if (warp == 0) choices.list(round.first, 0, tokens, lane);
        if (warp == P::WARPS - 1 && round.second.count > 0) choices.list(round.second, 4, tokens, lane);
        wait_for_previous_kernel();
        __syncthreads();
        prepare_round<P>(
            round, warp,
            [&](float (&values)[8], int place, int unit) {
              const long long line = choices.chosen()[place];
              const int first = (ONE_CLASS && place >= round.first.places ? round.second.slice : round.first.slice) * P::UNITS;
              load_hidden_eight<L::I>(values, (const __half*)hidden + line * L::I, (const unsigned char*)shifts + line * L::SHIFTS, (first + unit) * COLUMNS, lane);
            },
            [&](const float (&values)[8], int place, int unit) { prepared.template write<F>(values, unit, place, lane); });
        return round.quads();
      };
      take_runs<F>(
          prepared, max((runs - warp + P::WARPS - 1) / P::WARPS, 0), lane, unit_of, apart, begin, ready,
          [&](int run, const Sums& sums, auto count) { keep<count.VALUE>(block.template result<count.VALUE>(warp + run * P::WARPS), sums, lane); });
    });
    __syncthreads();
    for_results<P>(round, [&](int pair, int tile, int row, int place, int column) {
      const int out = (round.tile(pair) + tile) * ROWS + row;
      if (out >= L::H) return;
      const bool second = round.in_second(pair);
      const int named = choices.chosen()[place];
      float sum = block.sum(round.quads(), 0, pair, tile, row, column);
      if ((L::BIASES & 4) && (second ? round.second.slice : round.first.slice) == 0)
        sum += weights[named] * ((const float*)bias)[(second ? round.second.expert : round.first.expert) * (long long)L::H + out];
      add(y + (long long)(named / TOP) * L::H + out, sum);
    });
    __syncthreads();   // before the choices and activations are overwritten
  }
  wait_for_previous_kernel();   // where there was nothing to do: not to end before the kernel ahead
}

}  // namespace moqc::quads
#endif
