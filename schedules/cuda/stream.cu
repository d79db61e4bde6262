// A warp of moqc's decode kernels: units of one or two matrices past the activations of 256 columns, on the way in
// registers or in a ring in shared memory.
#ifndef MOQC_STREAM
#define MOQC_STREAM

namespace moqc {

// Geometry of a launch. TOKENS is 1 or 8 (a call of 2 to 8 tokens). A block takes ITEMS times TILES row tiles of each
// projection; after every TILES its warps add up what they have.
template <int WARPS_, int TILES_, int STAGES_, bool REGISTERS_, int TOKENS_, int ITEMS_> struct Plan {
  static constexpr int WARPS = WARPS_, TILES = TILES_, STAGES = STAGES_, TOKENS = TOKENS_, ITEMS = ITEMS_, THREADS = 32 * WARPS_;
  static constexpr bool REGISTERS = REGISTERS_;
  static constexpr int RINGS = REGISTERS_ ? 0 : STAGES_;   // slots in shared memory
  template <class All> static constexpr int OWN = TOKENS_ == 1 ? BYTES_SCRATCH : RINGS * All::SLOT;   // bytes of shared memory a warp
};

// A lane's 4, 8, 16 or 32 bytes of scales or zeros.
__device__ __forceinline__ void fetch_groups(word shared, const char* p, int bytes, int lane) {
  shared += lane * bytes;
  if (bytes == 4) copy<4>(shared, p);
  if (bytes == 8) copy<8>(shared, p);
  if (bytes >= 16) copy<16>(shared, p);
  if (bytes == 32) copy<16>(shared + 16, p + 16);
}
template <class All> __device__ __forceinline__ void fetch(word slot, const Unit& unit, int lane) {
#pragma unroll
  for (int j = 0; j < All::BITS; ++j)
    if (j < unit.bits) copy16(slot + j * 512 + lane * 16, unit.codes + j * 512);
  const word scales = slot + All::CODES, zeros = scales + All::SCALES;
  fetch_groups(scales, unit.scales, unit.groups * 2 * unit.scale, lane);
  if (All::HAS_ZEROS && !unit.symmetric) fetch_groups(zeros, unit.zeros, unit.groups * 2, lane);
}

__device__ __forceinline__ void swap(Unit& a, Unit& b) {
  const Unit c = a;
  a = b, b = c;
}

// The row tiles of up to two matrices (TILES of gate, as many of up, and so on), through this warp's ring.
template <class P, class All, int UNITS, int PHASES> struct Stream {
  Unit next, other;       // what to fetch next; the other matrix
  word ring;              // shared address of this warp's slots
  const char* memory;     // the same, to read
  int lane, fetched, taken;

  __device__ __forceinline__ void fetch_one() {
    if (fetched < PHASES * P::TILES * P::ITEMS) {
      if (PHASES == 2 && fetched > 0 && fetched % P::TILES == 0) swap(next, other);
      if (All::COUNT > 1) __syncwarp();   // where the slot was laid out for another format, its bytes were other lanes'
      fetch<All>(ring + fetched % P::STAGES * All::SLOT, next, lane);
      next.step(UNITS);
    }
    ++fetched;
    copy_commit();   // an empty group at the end keeps the count
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < P::STAGES - 1; ++i) fetch_one();
  }
  // TILES tiles of one format; `partials` is the warp's place in the first of them.
  template <class F> __device__ __forceinline__ void run(const word* x, const float* sums, float2 factor, float* partials) {
#pragma unroll 1
    for (int tile = 0; tile < P::TILES; ++tile) {
      fetch_one();
      copy_wait<P::STAGES - 1>();
      const char* slot = memory + taken % P::STAGES * All::SLOT;
      ++taken;
      uint4 codes[F::BITS];
#pragma unroll
      for (int j = 0; j < F::BITS; ++j) codes[j] = *(const uint4*)(slot + j * 512 + lane * 16);
      const word* scales = (const word*)(slot + All::CODES + lane * (2 * F::SCALE * F::GROUPS));
      const word* zeros = (const word*)(slot + All::CODES + All::SCALES + lane * (2 * F::GROUPS));
      float acc[4];
      dot<F>(acc, (const word*)codes, x, sums, scales, zeros);
      store_partial<P::TOKENS>(partials + tile * (P::WARPS * ROWS * P::TOKENS), acc, factor, lane);
    }
  }
};

// DEPTH units of as many tiles, in registers.
template <class All, int DEPTH> struct Window {
  word codes[DEPTH][All::BITS * 4], scales[DEPTH][All::GROUPS], zeros[DEPTH][All::GROUPS / 2];

  __device__ __forceinline__ void load(int i, const Unit& unit) {
#pragma unroll
    for (int j = 0; j < All::BITS; ++j)
      if (j < unit.bits) load16(codes[i] + 4 * j, unit.codes + j * 512);
#pragma unroll
    for (int j = 0; j < All::GROUPS; j += 2)
      if (j < unit.groups) {
        if (unit.scale == 1) load4(scales[i] + j / 2, (const word*)unit.scales + j / 2);
        else load8(scales[i] + j, (const uint2*)unit.scales + j / 2);
      }
#pragma unroll
    for (int j = 0; j < All::GROUPS / 2; ++j)
      if (All::HAS_ZEROS && !unit.symmetric && 2 * j < unit.groups) load4(zeros[i] + j, (const word*)unit.zeros + j);
  }
};

// Tiles that a warp has on their way in registers.
template <class P, int PHASES> __host__ __device__ constexpr int window_of() { return PHASES * P::TILES % P::STAGES == 0 ? P::STAGES : P::TILES; }

// The same of one token by bytes: STAGES tiles of the kernel's widest format, or as many of a narrower one as take no more
// registers; an odd number of tiles all at once.
template <class P, int PHASES, class All, class F> __host__ __device__ constexpr int byte_window_of() {
  const int most = P::STAGES * (4 * All::BITS + 2) / (4 * F::BITS + 2), total = PHASES * P::TILES;
  int window = total % 2 == 0 ? 2 : total + 1;
  for (int i = 4; i <= most && i <= total; i += 2) window = total % i == 0 ? i : window;
  return window;
}

// body(F{}) for the format called `id`.
template <class Body, class... Fs> __device__ __forceinline__ void with_format(Formats<Fs...>, int id, Body body) {
  if (sizeof...(Fs) == 1)
    (body(Fs{}), ...);
  else
    ((id == Fs::ID ? (body(Fs{}), 0) : 0), ...);
}

// The row tiles of one matrix, or of two of the same format, through a window of registers.
template <class P, class F, int UNITS, int PHASES, int ITEMS, class Wait, class GetX, class Finish>
__device__ __forceinline__ void stream_registers(float* partials, const Unit& first, const Unit& second, int lane, Wait wait, GetX get_x, Finish finish) {
  constexpr int TILE = P::WARPS * ROWS * P::TOKENS, TOTAL = PHASES * P::TILES, DEPTH = window_of<P, PHASES>();
  word x[Formats<F>::X];
  float sums[2 * F::GROUPS];
  Window<Formats<F>, DEPTH> window;
  Unit next = Unit::with_facts<F>(first), other = Unit::with_facts<F>(second);
  int fetched = 0;
  const auto load = [&](int i) {
    if (PHASES == 2 && ITEMS == 1 && fetched == P::TILES) next = other;   // cheaper than the general case below
    if (PHASES == 2 && ITEMS > 1 && fetched > 0 && fetched % P::TILES == 0) swap(next, other);
    window.load(i, next);
    next.step(UNITS);
    ++fetched;
  };
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) load(i);
  wait();
  const float2 factor = get_x(x);
  prepare<F>(x, sums);
#pragma unroll 1
  for (int item = 0; item < ITEMS; ++item) {
#pragma unroll 1
    for (int tile = 0; tile < TOTAL; tile += DEPTH)
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        float acc[4];
        dot<F>(acc, window.codes[i], x, sums, window.scales[i], window.zeros[i]);
        if (ITEMS == 1 ? tile + DEPTH < TOTAL : fetched < TOTAL * ITEMS) load(i);
        store_partial<P::TOKENS>(partials + (tile + i) * TILE, acc, factor, lane);
      }
    finish(item);
  }
}

// The same of one token by bytes, two row tiles at a time: one of each matrix, or two of one, of which the last may be missing.
template <class P, class F, int DEPTH, int UNITS, int PHASES, class Wait, class GetEight, class Finish>
__device__ __forceinline__ void stream_bytes(char* scratch, float* partials, const Unit& first, const Unit& second, int lane, Wait wait, GetEight get_eight, Finish finish) {
  constexpr int TILE = P::WARPS * ROWS, TOTAL = PHASES * P::TILES;
  Window<Formats<F>, DEPTH> window;
  Unit next[2] = {Unit::with_facts<F>(first), Unit::with_facts<F>(second)};
  const auto load = [&](int i) {
    window.load(i, next[i % PHASES]);
    next[i % PHASES].step(UNITS);
  };
#pragma unroll
  for (int i = 0; i < DEPTH; ++i)
    if (i < TOTAL) load(i);
  wait();
  float own[8];
  get_eight(own);
  ByteActivations<F> x;
  const float factor = x.prepare(own, scratch, lane) / SCALE;
#pragma unroll 1
  for (int tile = 0; tile < TOTAL; tile += DEPTH)
#pragma unroll
    for (int i = 0; i < DEPTH; i += 2) {
      float acc[4];
      dot_bytes<F>(acc, x, {window.codes[i], window.codes[i + 1]}, {window.scales[i], window.scales[i + 1]}, {window.zeros[i], window.zeros[i + 1]});
      if (tile + DEPTH < TOTAL) load(i), load(i + 1);
      store_quad(partials + (tile + i) / PHASES * TILE, PHASES == 2 ? P::TILES * TILE : TILE, acc, factor, lane, tile + i + 1 < TOTAL);
    }
  finish(0);
}

// One format's row tiles through registers.
template <class P, class All, class F, int UNITS, int PHASES, int ITEMS, class Wait, class GetX, class GetEight, class Finish>
__device__ __forceinline__ void stream_one(char* scratch, float* partials, const Unit& first, const Unit& second, int lane, Wait wait, GetX get_x, GetEight get_eight, Finish finish) {
  if constexpr (P::TOKENS == 1 && ITEMS == 1 && BY_BYTES<F>)
    stream_bytes<P, F, byte_window_of<P, PHASES, All, F>(), UNITS, PHASES>(scratch, partials, first, second, lane, wait, get_eight, finish);
  else
    stream_registers<P, F, UNITS, PHASES, ITEMS>(partials, first, second, lane, wait, get_x, finish);
}

// The same through a ring, formats as they come.
template <class P, class All, int UNITS, int PHASES, class Wait, class GetX, class Finish>
__device__ __forceinline__ void stream_ring(char* ring, float* partials, const Unit& first, const Unit& second, int lane, Wait wait, GetX get_x, Finish finish) {
  constexpr int TILE = P::WARPS * ROWS * P::TOKENS;
  word x[All::X];
  float sums[2 * All::GROUPS];
  Stream<P, All, UNITS, PHASES> stream{first, second, (word)__cvta_generic_to_shared(ring), ring, lane, 0, 0};
  stream.start();
  wait();
  int prepared = -1;
  float2 factor = make_float2(1.0f, 1.0f);
#pragma unroll 1
  for (int item = 0; item < P::ITEMS; ++item) {
#pragma unroll 1
    for (int phase = 0; phase < PHASES; ++phase) {
      const int id = phase ? second.id : first.id;
      if (id != prepared) {
        factor = get_x(x);
        with_format(All{}, id, [&](auto format) { prepare<decltype(format)>(x, sums); });
        prepared = id;
      }
      with_format(All{}, id, [&](auto format) {
        stream.template run<decltype(format)>(x, sums, factor, partials + phase * P::TILES * TILE);
      });
    }
    finish(item);
  }
}

// One warp's work in a block: PHASES matrices, one unit of each row tile. `wait` runs once the first weights are on their
// way, `get_x` loads the raw activations (and returns their factors), `get_eight` the lane's eight of one token, `finish(item)` is called by every warp of the block after TILES tiles of each.
template <class P, class All, int UNITS, int PHASES, class Wait, class GetX, class GetEight, class Finish>
__device__ __forceinline__ void multiply(char* ring, float* partials, const Unit& first, const Unit& second, int lane, Wait wait, GetX get_x, GetEight get_eight, Finish finish) {
  if constexpr (!P::REGISTERS) {
    stream_ring<P, All, UNITS, PHASES>(ring, partials, first, second, lane, wait, get_x, finish);
  } else if (PHASES == 1 || All::COUNT == 1 || first.id == second.id) {
    with_format(All{}, first.id, [&](auto format) {
      stream_one<P, All, decltype(format), UNITS, PHASES, P::ITEMS>(ring, partials, first, second, lane, wait, get_x, get_eight, finish);
    });
  } else if constexpr (PHASES == 2) {
    constexpr int TILE = P::WARPS * ROWS * P::TOKENS;
    const auto nothing = [](int) {};
    Unit units[2] = {first, second};
#pragma unroll 1
    for (int item = 0; item < P::ITEMS; ++item) {
      with_format(All{}, first.id, [&](auto format) {
        stream_one<P, All, decltype(format), UNITS, 1, 1>(ring, partials, units[0], units[0], lane, wait, get_x, get_eight, nothing);
      });
      __syncwarp();   // all lanes have read the activations that the next ones are written over
      with_format(All{}, second.id, [&](auto format) {
        stream_one<P, All, decltype(format), UNITS, 1, 1>(ring, partials + P::TILES * TILE, units[1], units[1], lane, wait, get_x, get_eight, nothing);
      });
      units[0].step(UNITS * P::TILES), units[1].step(UNITS * P::TILES);
      finish(item);
    }
  }
}

}  // namespace moqc
#endif
