// The two products of moqc's decode kernels, for NVIDIA GPUs, sm_80 and later: blocks of `stream.cu`'s warps.
#ifndef MOQC_DECODE
#define MOQC_DECODE

namespace moqc {

// ---------------------------------------------------------------------------------------------- routing
// (class, index) of `expert`, from `table` [EXPERTS][2]. A single class holds every expert in order, so there is
// nothing to read; else all lanes read the table while the expert's number is still on its way.
template <int COUNT, int EXPERTS> __device__ __forceinline__ int2 find(const int* table, long long expert, int lane) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  if constexpr (COUNT == 1) {
    return make_int2(0, (int)expert);
  } else if constexpr (EACH <= 8) {
    const word number = (word)expert;
    int2 mine = {0, 0};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int2 entry = __ldg((const int2*)table + min(32 * i + lane, EXPERTS - 1));
      mine.x = number / 32 == i ? entry.x : mine.x, mine.y = number / 32 == i ? entry.y : mine.y;
    }
    return make_int2(__shfl_sync(0xffffffffu, mine.x, number % 32), __shfl_sync(0xffffffffu, mine.y, number % 32));
  } else {
    const bool known = expert >= 0 && expert < EXPERTS;
    return __ldg((const int2*)table + (known ? expert : 0));
  }
}

// The expert of a slot of up to 8 tokens, as `route_few` lists them: those that the ids name, rising; -1 past the last.
template <int EXPERTS, class Id> __device__ __forceinline__ int expert_of(const Id* ids, int count, int slot, int lane) {
  word named[(EXPERTS + 31) / 32] = {};
#pragma unroll 2
  for (int i = lane; i < count; i += 32) {
    const Id id = ids[i];
#pragma unroll
    for (int w = 0; w < (EXPERTS + 31) / 32; ++w)
      if (id >= 0 && id < EXPERTS && (int)id / 32 == w) named[w] |= 1u << ((int)id % 32);
  }
  int before = 0, expert = -1;
#pragma unroll
  for (int w = 0; w < (EXPERTS + 31) / 32; ++w) {
    const word all = __reduce_or_sync(0xffffffffu, named[w]);
    const word found = __ballot_sync(0xffffffffu, (all >> lane & 1) && before + __popc(all & ((1u << lane) - 1)) == slot);
    if (found != 0) expert = 32 * w + __ffs(found) - 1;
    before += __popc(all);
  }
  return expert;
}

// ---------------------------------------------------------------------------------------------- the two products
// Gate functions of moqc/quant/activations.py; ALPHA and LIMIT are the bits of floats.
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float clamp(float v, float limit) { return fminf(fmaxf(v, -limit), limit); }
__device__ __forceinline__ float gelu_erf(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); }
__device__ __forceinline__ float gelu_tanh(float v) { return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v))); }
#define MOQC_ACTIVATION(NAME, IS_GATED, EXPRESSION)                                        \
  template <word ALPHA, word LIMIT> struct NAME {                                          \
    static constexpr bool GATED = IS_GATED;                                                \
    __device__ static float of(float gate, float up) {                                     \
      const float alpha = __uint_as_float(ALPHA), limit = __uint_as_float(LIMIT);          \
      (void)alpha, (void)limit, (void)gate;                                                \
      return EXPRESSION;                                                                   \
    }                                                                                      \
  };
MOQC_ACTIVATION(act_silu_glu, true, silu(gate) * up)
MOQC_ACTIVATION(act_gelu_glu, true, gelu_erf(gate) * up)
MOQC_ACTIVATION(act_gelu_tanh_glu, true, gelu_tanh(gate) * up)
MOQC_ACTIVATION(act_relu_glu, true, fmaxf(gate, 0.0f) * up)
MOQC_ACTIVATION(act_oai_swiglu, true, fminf(gate, limit) / (1.0f + __expf(-alpha * fminf(gate, limit))) * (clamp(up, limit) + 1.0f))
MOQC_ACTIVATION(act_silu_glu_clamp, true, silu(fminf(gate, limit)) * clamp(up, limit))
MOQC_ACTIVATION(act_silu_glu_postclamp, true, fminf(silu(gate), limit) * clamp(up, limit))
MOQC_ACTIVATION(act_silu, false, silu(up))
MOQC_ACTIVATION(act_gelu, false, gelu_erf(up))
MOQC_ACTIVATION(act_relu2, false, fmaxf(up, 0.0f) * fmaxf(up, 0.0f))

// BIASES: bits of gate (1), up (2) and down (4).
template <int H_, int I_, int EXPERTS_, int BIASES_, class Activation_> struct Layer {
  static constexpr int H = H_, I = I_, EXPERTS = EXPERTS_, BIASES = BIASES_;
  static constexpr int SHIFTS = (I_ + COLUMNS - 1) / COLUMNS * 16;   // bytes for one row of `hidden`
  static constexpr bool GATED = Activation_::GATED;
  using Activation = Activation_;
};

// One value of `hidden`, row `out` of line `at`; 16 lanes together have those of a row tile.
template <class L>
__device__ __forceinline__ void store_hidden(__half* hidden, unsigned char* shifts, long long at, int out, bool inside, float value, int lane) {
  const word sixteen = 0xffffu << (lane & 16);
  float most = fabsf(value);
  int shift = 0;
  if (__ballot_sync(sixteen, most >= LIMIT) != 0) {
#pragma unroll
    for (int other = 8; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(sixteen, most, other));
    shift = shift_of(most), value *= power(-shift);
  }
  if (inside) hidden[at * L::I + out] = __float2half(value);
  if (out % ROWS == 0) shifts[at * L::SHIFTS + out / ROWS] = (unsigned char)shift;
}

// hidden[slot][column][I] = share * act(gate x + bias, up x + bias) in fp16, with `shifts` (see load_hidden); y [tokens][H]
// is set to 0 for `down` to add to, unless x is what `route_and_halve` made, with `factor_list`. For 1 token, slots and shares are the router's ids and weights; else `members` names
// the token of each of a slot's 8 columns (-1: none, its share is 0). ROUTED: `slot_list` has the router's ids of up to 8 tokens,
// `top` each, so that weights are on their way before `route_and_halve`, the kernel ahead, has made the lists.
// Grid: slots x (row tiles of I / TILES); WARPS == units of H.
template <class L, class P, bool ROUTED, class Gates, class Ups, class All, class Id, class X, class... Tensors>
__device__ __forceinline__ void gate_up(void* memory, const X* x, const void* factor_list, int tokens, int top, const void* slot_list, const void* share_list, const void* member_list,
                                        const void* hit, const int* table, const void* gate_bias, const void* up_bias, void* hidden_rows,
                                        void* shift_rows, float* y, const Tensors*... packed) {
  constexpr int UNITS = (L::H + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::I + ROWS - 1) / ROWS, GROUPS = ROW_TILES / (P::TILES * P::ITEMS);
  constexpr int PHASES = L::GATED ? 2 : 1, TILE = P::WARPS * ROWS * P::TOKENS;
  static_assert(P::WARPS == UNITS && ROW_TILES % (P::TILES * P::ITEMS) == 0, "a warp for each unit of a row, whole groups of row tiles");
  const Id* slots = (const Id*)slot_list;
  const float* shares = (const float*)share_list;
  __half* hidden = (__half*)hidden_rows;
  unsigned char* shifts = (unsigned char*)shift_rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slot = blockIdx.x / GROUPS, tile = blockIdx.x % GROUPS * (P::TILES * P::ITEMS);
  const auto wait = [] { wait_for_previous_kernel(), start_next_kernel(); };
  if (!ROUTED) wait();
  const int used = P::TOKENS > 1 && !ROUTED ? load_now((const int*)hit) : 0;
  const long long expert = ROUTED ? (long long)expert_of<L::EXPERTS>(slots, tokens * top, slot, lane) : (long long)load_now(slots + slot);
  int token = 0;
  constexpr bool SAME_COLUMN = P::TOKENS > 1 && P::THREADS / ROWS % P::TOKENS == 0;   // a thread finishes values of one column
  float early = 0.0f, own[8];   // a share; one token's activations, which do not wait for the expert
  const auto load_lists = [&] {
    if (P::TOKENS > 1) token = load_now((const int*)member_list + slot * P::TOKENS + lane / 4);
    if (SAME_COLUMN) early = load_now(shares + slot * P::TOKENS + threadIdx.x / ROWS % P::TOKENS);
  };
  if (!ROUTED) load_lists();
  if constexpr (P::TOKENS == 1) early = load_now(shares + slot), load_eight<L::H>(own, x, warp * COLUMNS, lane);
  if (!HALVES<X>)
    for (long long i = (long long)blockIdx.x * P::THREADS + threadIdx.x; i < (long long)tokens * L::H; i += (long long)gridDim.x * P::THREADS) y[i] = 0.0f;
  if (ROUTED && expert < 0) wait();   // not to end before the kernel ahead
  if (P::TOKENS > 1 && (ROUTED ? expert < 0 : slot >= used)) return;
  const void* const tensors[] = {packed...};
  constexpr int CLASSES = largest(Gates::COUNT, Ups::COUNT);
  const int2 second_place = find<CLASSES, L::EXPERTS>(table + 2 * L::EXPERTS, expert, lane);
  const int2 first_place = L::GATED ? find<CLASSES, L::EXPERTS>(table, expert, lane) : second_place;
  if (expert < 0 || expert >= L::EXPERTS) return;
  const long long unit = (long long)tile * UNITS + warp, matrix = (long long)ROW_TILES * UNITS;
  const Unit second = locate(Ups{}, tensors + 3 * Gates::COUNT, second_place, matrix, unit, lane);
  Unit first = second;
  if constexpr (L::GATED) first = locate(Gates{}, tensors, first_place, matrix, unit, lane);
  float* partials = (float*)memory;
  char* ring = (char*)memory + PHASES * P::TILES * TILE * 4 + warp * P::template OWN<All>;
  const auto get_x = [&](word* values) {
    if constexpr (HALVES<X>) {
      const float given = token >= 0 ? ((const float*)factor_list)[token] : 1.0f;
      load_halves(values, (const __half*)x + (long long)token * (UNITS * COLUMNS), warp * COLUMNS, token >= 0, lane);
      return factors(given, lane);
    } else {
      return load_x<L::H>(values, x + (long long)token * L::H, warp * COLUMNS, token >= 0, lane);
    }
  };
  const auto finish = [&](int item) {
    __syncthreads();
    for (int i = threadIdx.x; i < P::TILES * ROWS * P::TOKENS; i += P::THREADS) {
      const int t = i / (ROWS * P::TOKENS), row = i % ROWS, column = i / ROWS % P::TOKENS, out = (tile + item * P::TILES + t) * ROWS + row;
      const bool inside = L::I % ROWS == 0 || out < L::I;
      float gate = sum_partials<P::WARPS, P::TOKENS>(partials + t * TILE, row, column);
      float up = L::GATED ? sum_partials<P::WARPS, P::TOKENS>(partials + (P::TILES + t) * TILE, row, column) : gate;
      if ((L::BIASES & 1) && inside) gate += ((const float*)gate_bias)[expert * L::I + out];
      if ((L::BIASES & 2) && inside) up += ((const float*)up_bias)[expert * L::I + out];
      const float share = P::TOKENS == 1 || SAME_COLUMN ? early : shares[slot * P::TOKENS + column], value = share == 0.0f || !inside ? 0.0f : share * L::Activation::of(gate, up);
      store_hidden<L>(hidden, shifts, (long long)slot * P::TOKENS + column, out, inside, value, lane);
    }
    if (item + 1 < P::ITEMS) __syncthreads();   // before the partial sums are overwritten
  };
  const auto get_eight = [&](float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = own[i];
  };
  multiply<P, All, UNITS, PHASES>(ring, partials + warp * (ROWS * P::TOKENS), first, second, lane, [&] { if (ROUTED) wait(), load_lists(); }, get_x, get_eight, finish);
}

// y[token][H] += sum over slots of down x hidden + share * bias, cut into blocks of WARPS units. Up to 8 tokens, column c
// is token c in every slot, and all slots together are one dot product; where one block holds all of it (ADD false), y is
// written instead: no atomics, the same bits every time. With more tokens (MANY), a block's units are of one slot.
template <class L, class P, bool ADD, bool MANY, class Downs, class All, class Id, class... Tensors>
__device__ __forceinline__ void down(void* memory, const void* hidden, const void* shifts, int tokens, const void* slot_list, const void* share_list,
                                     const void* member_list, const void* hit, int top, const int* table, const void* bias, float* y,
                                     const Tensors*... packed) {
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, GROUPS = ROW_TILES / (P::TILES * P::ITEMS);
  constexpr int TILE = P::WARPS * ROWS * P::TOKENS, SLICES = (UNITS + P::WARPS - 1) / P::WARPS;   // SLICES: of a slot, if MANY
  static_assert(ROW_TILES % (P::TILES * P::ITEMS) == 0, "whole groups of row tiles");
  const Id* slots = (const Id*)slot_list;
  const float* shares = (const float*)share_list;
  const int* members = (const int*)member_list;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = blockIdx.x % GROUPS * (P::TILES * P::ITEMS), slice = blockIdx.x / GROUPS;
  start_next_kernel();
  const int number = slice * P::WARPS + warp, slot = MANY ? slice / SLICES : number / UNITS;
  const int column = MANY ? slice % SLICES * P::WARPS + warp : number % UNITS;
  const int experts = P::TOKENS == 1 ? top : *(const int*)hit;
  if (P::TOKENS > 1 && (MANY ? slot >= experts : number - warp >= experts * UNITS)) return;
  const void* const tensors[] = {packed...};
  float* partials = (float*)memory;
  const bool mine_to_do = slot < experts && column < UNITS;
  const long long expert = mine_to_do ? (long long)slots[slot] : -1;
  int2 at = {0, 0};
  if (mine_to_do) at = find<Downs::COUNT, L::EXPERTS>(table + 4 * L::EXPERTS, expert, lane);
  const auto biases = [&](int column, int out) {   // of the slots whose first unit is in this block
    float sum = 0.0f;
    const int first = MANY ? slot : (slice * P::WARPS + UNITS - 1) / UNITS, last = MANY ? slot + (slice % SLICES == 0) : (slice * P::WARPS + P::WARPS + UNITS - 1) / UNITS;
    for (int s = first; s < min(last, experts); ++s) {
      const long long e = slots[s];
      if (e >= 0 && e < L::EXPERTS) sum += shares[s * P::TOKENS + column] * ((const float*)bias)[e * L::H + out];
    }
    return sum;
  };
  const auto finish = [&](int item) {
    __syncthreads();
    for (int i = threadIdx.x; i < P::TILES * ROWS * P::TOKENS; i += P::THREADS) {
      const int t = i / (ROWS * P::TOKENS), row = i % ROWS, c = i / ROWS % P::TOKENS, out = (tile + item * P::TILES + t) * ROWS + row;
      float sum = sum_partials<P::WARPS, P::TOKENS>(partials + t * TILE, row, c);
      const int token = MANY ? members[slot * P::TOKENS + c] : c;
      if (token < 0 || token >= tokens || (L::H % ROWS != 0 && out >= L::H)) continue;
      if (L::BIASES & 4) sum += biases(c, out);
      if (ADD) add(y + (long long)token * L::H + out, sum);
      else y[(long long)token * L::H + out] = sum;
    }
    if (item + 1 < P::ITEMS) __syncthreads();
  };
  float* const mine = partials + warp * (ROWS * P::TOKENS);
  if (expert >= 0 && expert < L::EXPERTS) {
    const Unit unit = locate(Downs{}, tensors, at, (long long)ROW_TILES * UNITS, (long long)tile * UNITS + column, lane);
    const long long line = (long long)slot * P::TOKENS + (P::TOKENS == 1 ? 0 : lane / 4);
    const __half* row = (const __half*)hidden + line * L::I;
    const unsigned char* shift_row = (const unsigned char*)shifts + line * L::SHIFTS;
    char* const ring = (char*)memory + P::TILES * TILE * 4 + warp * P::template OWN<All>;
    const auto get_x = [&](word* values) { return load_hidden<L::I>(values, row, shift_row, column * COLUMNS, true, lane); };
    const auto get_eight = [&](float (&values)[8]) { load_hidden_eight<L::I>(values, row, shift_row, column * COLUMNS, lane); };
    multiply<P, All, UNITS, 1>(ring, mine, unit, unit, lane, [] { wait_for_previous_kernel(); }, get_x, get_eight, finish);
  } else {
    const float nothing[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int t = 0; t < P::TILES; ++t) store_partial<P::TOKENS>(mine + t * TILE, nothing, make_float2(1.0f, 1.0f), lane);
    wait_for_previous_kernel();   // before y is touched
    for (int item = 0; item < P::ITEMS; ++item) finish(item);
  }
}

}  // namespace moqc
#endif
