// Device code of moqc's grouped product for many tokens: Hopper's warp groups (sm_90a).
//
// Weights are the tensor core's operand A, in registers: a unit of layout mma16x256 is what a warp needs of it, so codes
// only have to become numbers. Activations are operand B, in shared memory. They lie in memory as *images*: for each 64
// columns and each slot (8 tokens of an expert, routing.cu) the 1024 bytes that the tensor core reads, columns in the
// order in which the codes come, so that a tile is one copy by the bulk copy engine.
//
// A block is two warp groups that multiply, and a third that copies ahead, and gives its registers to the others. Of up to 128
// tokens a warp group has two blocks of 64 rows (gate and up of the same 64 outputs, or 128 rows of one matrix), of more one,
// so that weights are made from codes once for 256 tokens (two warps then have gate's rows, and two up's, and swap results). Of few tokens
// four warp groups multiply, one block of 64 rows each: it takes them to hide how long a product takes (by int8: prefill_bytes.cu).
// Blocks stay, take tiles in turn, and their second group stays behind the first: one writes results while the other multiplies.
#ifndef MOQC_PREFILL
#define MOQC_PREFILL

namespace moqc {
#if __CUDA_ARCH_FEAT_SM90_ALL
// The first of the numbers of tokens N that is enough for `slots`, of at most MOST tokens.
template <int MOST, int N, int... Rest, class Run> __device__ __forceinline__ void with_tokens(int slots, Run run) {
  if constexpr (N >= MOST) {
    run(Number<MOST>{});
  } else {
    if (slots * 8 <= N) run(Number<N>{});
    else with_tokens<MOST, Rest...>(slots, run);
  }
}

// The frame of both products: `facts(slot)` gives 8 bytes about a token of the tile, given back to `finish(d, tile, rows, facts)`,
// which takes a tile's results, in shared memory.
template <class R, int UNITS, int SLICES, int ROW_BLOCKS, bool ANY, class Where, class Facts, class Finish>
__device__ __forceinline__ void grouped(char* memory, const void* tile_list, int items, const char* images, const char* image_facts, int capacity, Where where, Facts facts, Finish finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  const word barriers = shared_address(memory) + R::BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::X_STAGES; ++i) barrier_init(barriers + 8 * i, 1), barrier_init(barriers + 8 * (R::X_STAGES + i), R::MULTIPLIERS);
    for (int i = 0; i < R::W_STAGES; ++i) barrier_init(barriers + 8 * (2 * R::X_STAGES + i), WEIGHT_COPIERS), barrier_init(barriers + 8 * (2 * R::X_STAGES + R::W_STAGES + i), R::MULTIPLIERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  constexpr int FACTS = (R::TOKENS + 127) / 128;   // of a thread
  int x_count = 0, w_count = 0, rows, row_tile;
  if (warp >= R::MULTIPLIERS) {
    if (R::GROUPS == 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS * SLICES, R::SLOTS>(tile_list, item, rows);
      const int slice = rows % SLICES, begin = UNITS * slice / SLICES, end = UNITS * (slice + 1) / SLICES;
      rows /= SLICES;
      if (warp > R::MULTIPLIERS) {
        const auto matrices = where(tile.expert, rows);
        copy_weights<R, UNITS>(shared_address(memory), matrices, begin, end, w_count, warp - R::MULTIPLIERS - 1, lane);
      } else if (lane == 0) {
        const long long at = (long long)begin * 2 * capacity + tile.first;
        if constexpr (R::BYTES) copy_planes<R>(shared_address(memory), images + at * BYTE_ATOMS, image_facts + at * BYTE_FACTS, capacity, tile.slots, end - begin, x_count);
        else copy_x<R>(shared_address(memory), images + ((long long)begin * 4 * capacity + tile.first) * ATOM, (long long)capacity * ATOM, tile.slots, end - begin, x_count);
      }
    }
  } else {
    if (R::GROUPS == 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if (R::GROUPS == 2 && group == 1 && blockIdx.x < items) asm volatile("bar.sync 5, 256;" ::: "memory");   // behind the first, so that one's results are written while the other multiplies
    RingPlace<R::X_STAGES> x_at;
    RingPlace<R::W_STAGES> w_at;
    bool first = R::GROUPS == 2;
    uint2* known = (uint2*)(memory + R::FACTS_AT) + group * (FACTS * 128);
    float d[128];
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS * SLICES, R::SLOTS>(tile_list, item, rows);
      const int slice = rows % SLICES, begin = UNITS * slice / SLICES, end = UNITS * (slice + 1) / SLICES;
      rows /= SLICES;
      const auto matrices = where(tile.expert, rows);
      const int number = group * (4 * R::EACH) + warp % 4, ids[2] = {matrices(number, row_tile).id, matrices(number + 4 * (R::EACH - 1), row_tile).id};
      const auto multiply = [&](auto n) {
        if constexpr (R::BYTES) multiply_bytes<decltype(n)::value, R>(d, memory, end - begin, x_at, w_at, warp, lane);
        else if constexpr (R::All::COUNT > 1) multiply_several<decltype(n)::value, R>(d, memory, ids, end - begin, x_at, w_at, first, warp, lane);
        else if constexpr (R::GROUPS == 4) multiply_few<decltype(n)::value, R>(d, memory, end - begin, x_at, w_at, warp, lane);
        else multiply_tile<decltype(n)::value, R>(d, memory, end - begin, x_at, w_at, first, warp, lane);
      };
      uint2 mine[FACTS];
#pragma unroll
      for (int i = 0; i < FACTS; ++i) {
        const int place = i * 128 + threadIdx.x % 128;
        mine[i] = place < tile.slots * 8 ? facts(tile.first * 8 + place) : make_uint2(0, 0);
      }
      if constexpr (ANY) multiply(Number<R::TOKENS>{});
      else if constexpr (R::SLOTS <= 4) with_tokens<R::TOKENS, 8, 16, 24, 32>(tile.slots, multiply);
      else if constexpr (R::SLOTS <= 8) with_tokens<R::TOKENS, 24, 32, 40, 48, 64>(tile.slots, multiply);
      else if constexpr (R::SLOTS <= 16) with_tokens<R::TOKENS, 64, 72, 80, 96, 104, 120, 128>(tile.slots, multiply);
      else with_tokens<R::TOKENS, 72, 136, 160, 192, 208, 232, 256>(tile.slots, multiply);
      group_sync(group);   // all have read the facts of the tile before
#pragma unroll
      for (int i = 0; i < FACTS; ++i) known[i * 128 + threadIdx.x % 128] = mine[i];
      group_sync(group);
      finish(d, tile, rows, slice, known);
    }
  }
}
#endif

}  // namespace moqc
#endif
