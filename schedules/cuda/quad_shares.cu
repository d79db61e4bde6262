// How the int8 decode kernels for 2 and more tokens (quads.cu) deal out their work, for NVIDIA GPUs, sm_80 and later.
//
// A *slot* is an expert and up to TOKENS of its tokens, in the order of the router's ids. All slots' pairs of row tiles, expert by
// expert, are one line, on which a pair with two quads of tokens is longer than one with one; block b of B has the pairs that
// begin in the b-th of B equal parts of it. So all blocks have equally much, whatever the router chose, and few have pairs of
// more than two slots. Blocks read the ids themselves: there are no lists to wait for.
#ifndef MOQC_QUAD_SHARES
#define MOQC_QUAD_SHARES

namespace moqc::quads {

// Consecutive pairs of row tiles of one slot, in one slice of its columns. count is 0 if there are none.
struct Segment {
  int expert, slice, skip, places, first, count;   // skip: tokens of the expert in slots before; places: tokens
};

// What a block finds out from the ids of up to MOST_TOKENS tokens, TOP each, in shared memory. *Pairs* of a token and one of its
// choices are numbered token * TOP + choice; ids out of range are ignored.
template <int EXPERTS, int TOP, int MOST_TOKENS, int TOKENS> struct Choices {
  static constexpr int MOST = MOST_TOKENS * TOP, EACH = (EXPERTS + 31) / 32, COUNTS = 32 * EACH, QUADS = TOKENS / 4;
  static constexpr int BYTES = (4 * COUNTS + 4 * TOKENS + 2 * MOST + 15) / 16 * 16;
  char* memory;

  __device__ __forceinline__ int* counts() const { return (int*)memory; }
  __device__ __forceinline__ int* chosen() const { return counts() + COUNTS; }   // TOKENS pairs
  __device__ __forceinline__ short* experts() const { return (short*)(chosen() + TOKENS); }

  // All THREADS threads call this; `meanwhile()` is called while the ids are on their way.
  template <int THREADS, class Id, class Meanwhile> __device__ __forceinline__ void read(const Id* ids, int tokens, Meanwhile meanwhile) const {
    constexpr int READS = (MOST + THREADS - 1) / THREADS;
    Id mine[READS];
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      const int pair = i * THREADS + threadIdx.x;
      mine[i] = -1;
      if (pair < tokens * TOP) mine[i] = load_now(ids + pair);
    }
    for (int i = threadIdx.x; i < COUNTS; i += THREADS) counts()[i] = 0;
    meanwhile();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      const int expert = mine[i] >= 0 && mine[i] < EXPERTS ? (int)mine[i] : -1;
      if (i * THREADS + threadIdx.x < MOST) experts()[i * THREADS + threadIdx.x] = (short)expert;
      if (expert >= 0) atomicAdd(counts() + expert, 1);
    }
    __syncthreads();
  }

  // The length of a pair of row tiles, 2 and a quad's 1 each: a second quad adds about a third to its instructions. Of all slots' pairs.
  static __device__ __forceinline__ int length(int tokens) { return (tokens + 3) / 4 + (tokens + TOKENS - 1) / TOKENS * 2; }

  // The pairs that `segment`'s tokens are, at places place .. place + segment.places - 1. A warp calls this.
  __device__ __forceinline__ void list(const Segment& segment, int place, int tokens, int lane) const {
    int before = -segment.skip;
    for (int i = 0; i < tokens * TOP && before < segment.places; i += 32) {
      const bool named = i + lane < tokens * TOP && experts()[i + lane] == segment.expert;
      const word all = __ballot_sync(0xffffffffu, named);
      const int rank = before + __popc(all & ((1u << lane) - 1));
      if (named && rank >= 0 && rank < segment.places) chosen()[place + rank] = i + lane;
      before += __popc(all);
    }
  }
};

// What a block multiplies at a time: pairs of one segment, or of two whose tokens are a quad each (the second's at place 4).
struct Round {
  Segment first, second;

  __device__ __forceinline__ int pairs() const { return first.count + second.count; }
  __device__ __forceinline__ int places() const { return first.places + second.places; }
  __device__ __forceinline__ int columns() const { return max(first.places, second.places); }
  __device__ __forceinline__ int quads() const { return (columns() + 3) / 4; }
  __device__ __forceinline__ int place(int number) const { return number < first.places ? number : 4 + number - first.places; }
  __device__ __forceinline__ bool in_second(int pair) const { return pair >= first.count; }
  __device__ __forceinline__ int tile(int pair) const { return 2 * pair + (in_second(pair) ? 2 * (second.first - first.count) : 2 * first.first); }
};

// A block's part of the line, of slots whose slices have ITEMS pairs of row tiles each. All lanes have the same.
template <class C, int ITEMS, int SLICES> struct Share {
  C choices;
  int upto, mine;   // the length of an item of every slot, up to the lane's last expert; and of its own
  int at, end;

  __device__ __forceinline__ Share(const C& choices_, int lane) : choices(choices_), mine(0) {
#pragma unroll
    for (int i = 0; i < C::EACH; ++i) mine += C::length(choices.counts()[lane * C::EACH + i]);
    upto = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    const int all = __shfl_sync(0xffffffffu, upto, 31) * (ITEMS * SLICES), blocks = gridDim.x, block = blockIdx.x;
    at = all / blocks * block + min(block, all % blocks), end = at + all / blocks + (block < all % blocks);
  }

  // Up to `most` (at least one) of the next pairs, of one slot and slice; twice as many if it has one quad.
  __device__ __forceinline__ Segment take(int most) {
    while (at < end) {
      const int unit = at / ITEMS, item = unit / SLICES;   // places on shorter lines: of slices, of slots
      const int owner = __ffs(__ballot_sync(0xffffffffu, item < upto)) - 1;
      int begin = __shfl_sync(0xffffffffu, upto - mine, owner), expert = owner * C::EACH, count = choices.counts()[expert];
#pragma unroll
      for (int i = 1; i < C::EACH; ++i) {
        const int before = C::length(count);
        if (item >= begin + before) begin += before, count = choices.counts()[++expert];
      }
      constexpr int FULL = 2 + C::QUADS;
      const int slot = (item - begin) / FULL, skip = slot * (4 * C::QUADS), places = min(count - skip, 4 * C::QUADS);
      begin += slot * FULL;
      const int length = C::length(places);
      const auto whole = [&](int part) { return length == 3 ? (part + 2) / 3 : (part + 3) / 4; };
      const int slice = SLICES == 1 ? 0 : (unit - begin * SLICES) / length, base = (begin * SLICES + slice * length) * ITEMS;
      const int first = whole(at - base), last = whole(min(end - base, ITEMS * length)), taken = min(last - first, places <= 4 ? 2 * most : most);
      at = base + (taken > 0 ? first + taken : ITEMS) * length;
      if (taken > 0) return {expert, slice, skip, places, first, taken};
    }
    return {-1, 0, 0, 0, 0, 0};
  }

  // Up to `most` of them, of two segments if BOTH and both have few tokens.
  template <bool BOTH> __device__ __forceinline__ Round next(int most) {
    Round round = {take(most), {}};
    const int room = most - (round.first.count + 1) / 2;
    if (BOTH && room > 0 && round.first.places <= 4) {
      const int before = at;
      const Segment other = take(room);
      if (other.places <= 4) round.second = other;
      else at = before;
    }
    return round;
  }
};

}  // namespace moqc::quads
#endif
