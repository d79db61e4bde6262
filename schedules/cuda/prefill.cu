// Device code of moqc's grouped product for many tokens: Hopper's warp groups (sm_90a).
//
// Weights are the tensor core's operand A, in registers: a unit of layout mma16x256 is what a warp needs of it, so codes
// only have to become numbers. Activations are operand B, in shared memory. They lie in memory as *images*: for each 64
// columns and each slot (8 tokens of an expert, routing.cu) the 1024 bytes that the tensor core reads, columns in the
// order in which the codes come, so that a tile is one copy by the bulk copy engine.
//
// A block is two warp groups that multiply, and a third that copies ahead, and gives its registers to the others. Of up to 128
// tokens a warp group has two blocks of 64 rows (gate and up of the same 64 outputs, or 128 rows of one matrix), of more one,
// so that weights are made from codes once for 256 tokens (two warps then have gate's rows, and two up's, and swap results).
// Blocks stay, take tiles in turn, and their second group stays behind the first: one writes results while the other multiplies.
#ifndef MOQC_PREFILL
#define MOQC_PREFILL

namespace moqc {
#if __CUDA_ARCH_FEAT_SM90_ALL
// A warp's share of one tile of one format: d = its rows of the warp group's EACH blocks of 64, times N tokens; block 1 from d[64] on. Codes are read
// 64 columns ahead, and weights made for 16 columns of a block at a time while the tensor core works on those before.
template <int N, class R> __device__ __forceinline__ void multiply_tile(float (&d)[128], char* memory, int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, bool& first, int warp, int lane) {
  using All = typename R::All;
  constexpr int EACH = R::EACH;
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const auto release_x = [&](int stage) { barrier_arrive(barriers + 8 * (R::X_STAGES + stage)); };
  const char* const tiles = memory + R::W_AT + (warp / 4 * (4 * EACH) + warp % 4) * R::TILE;
  Raw<All> raw[EACH];
  const auto load = [&](int quarter) {   // of a unit
    const word full = barriers + 8 * (2 * R::X_STAGES + w_at.stage), empty = full + 8 * R::W_STAGES;
    if (quarter == 0) barrier_wait(full, w_at.phase);
    const char* at = tiles + w_at.stage * R::W_BYTES;
#pragma unroll
    for (int block = 0; block < EACH; ++block)
      with_format(All{}, 0, [&](auto format) { load_raw<decltype(format), All>(raw[block], at + block * (4 * R::TILE), quarter, lane); });
    if (quarter == 3) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      w_at.step(1);
    }
  };
  word a[2][4];
#pragma unroll
  for (int block = 0; block < EACH; ++block)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[64 * block + i] = 0.0f;
  load(0);
  Affine by[EACH][2];   // of a half
  int before = 0;   // the stage before
#pragma unroll 1
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int block = 0; block < EACH; ++block)
        with_format(All{}, 0, [&](auto format) {
          using F = decltype(format);
          if (64 * quarter % F::GROUP != 0) return;
          by[block][0] = affine<F, All>(raw[block], 0);
          if constexpr (All::GROUPS == 8) by[block][1] = F::GROUP == 32 ? affine<F, All>(raw[block], 1) : by[block][0];
        });
      const int stage = x_at.stage + quarter;
      barrier_wait(barriers + 8 * stage, x_at.phase);
      const unsigned long long b = descriptor(shared + stage * R::X_BYTES);
#pragma unroll
      for (int i = 0; i < 4 * EACH; ++i) {
        const int step = i / EACH, block = i % EACH;
        word(&weights)[4] = a[i % 2];
        wgmma_wait<1>();   // their registers are free
        if (i == 1 && (quarter > 0 || unit > 0) && lane == 0) release_x(before);   // and so is the stage before
        with_format(All{}, 0, [&](auto format) { weights_of<decltype(format), All>(weights, raw[block], by[block][All::GROUPS == 8 ? step / 2 : 0], step); });
#pragma unroll
        for (int k = 0; k < 4; ++k) asm volatile("" : "+r"(weights[k])::"memory");   // made before the fence
        wgmma_fence();
        Wgmma<N>::run(d + 64 * block, weights, b + step * 2);
        wgmma_commit();
      }
      if (first && quarter == R::AHEAD - 1) {
        first = false;
        if (warp < 4) asm volatile("bar.arrive 3, 256;" ::: "memory");
      }
      before = stage;
      if (quarter < 3) load(quarter + 1);
      else if (unit + 1 < units) load(0);
    }
    x_at.step(4);
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x(before);
}

// The same of several formats. Branches to their code are what that costs, so each leads to the weights of 64 columns of a block (32 where
// a warp group has one block) and to reading its next codes; products stay outside, where one piece of code serves all formats.
template <int N, class R> __device__ __forceinline__ void multiply_several(float (&d)[128], char* memory, const int (&ids)[2], int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, bool& first, int warp, int lane) {
  using All = typename R::All;
  constexpr int EACH = R::EACH, STEPS = 2 * EACH;   // STEPS: of 16 columns, that a branch makes
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const auto release_x = [&](int stage) { barrier_arrive(barriers + 8 * (R::X_STAGES + stage)); };
  const char* const tiles = memory + R::W_AT + (warp / 4 * (4 * EACH) + warp % 4) * R::TILE;
  Raw<All> raw[EACH];
  const auto wait_for_codes = [&] { barrier_wait(barriers + 8 * (2 * R::X_STAGES + w_at.stage), w_at.phase); };
  const auto read = [&](auto format, int block, int quarter) {
    load_raw<decltype(format), All>(raw[block], tiles + w_at.stage * R::W_BYTES + block * (4 * R::TILE), quarter, lane);
  };
#pragma unroll
  for (int block = 0; block < EACH; ++block)
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[64 * block + i] = 0.0f;
  wait_for_codes();
#pragma unroll
  for (int block = 0; block < EACH; ++block) with_format(All{}, ids[block], [&](auto format) { read(format, block, 0); });
  word a[2][4 * STEPS];
  int before = 0;   // the stage before
#pragma unroll 1
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int stage = x_at.stage + quarter, next = (quarter + 1) % 4;
      const bool more = next > 0 || unit + 1 < units;
      const unsigned long long b = descriptor(shared + stage * R::X_BYTES);
      if (next == 0) {   // this unit's codes are read
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers + 8 * (2 * R::X_STAGES + R::W_STAGES + w_at.stage));
        w_at.step(1);
        if (more) wait_for_codes();
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int block = EACH == 2 ? part : 0, step0 = EACH == 2 ? 0 : 2 * part;
        wgmma_wait<1>();   // the registers of this part are free
        if (part == 1 && (quarter > 0 || unit > 0) && lane == 0) release_x(before);   // and so is the stage before
        with_format(All{}, ids[block], [&](auto format) {
          using F = decltype(format);
          const Affine by = affine<F, All>(raw[block], F::GROUP == 32 ? step0 / 2 : 0);
          const Affine second = EACH == 2 && F::GROUP == 32 ? affine<F, All>(raw[block], 1) : by;
#pragma unroll
          for (int step = 0; step < STEPS; ++step) {
            word(&weights)[4] = *(word(*)[4])(a[part] + 4 * step);
            weights_of<F, All>(weights, raw[block], step < 2 ? by : second, step0 + step);
          }
          if (more && step0 + STEPS == 4) read(format, block, next);
        });
        if (part == 0) barrier_wait(barriers + 8 * stage, x_at.phase);
#pragma unroll
        for (int k = 0; k < 4 * STEPS; ++k) asm volatile("" : "+r"(a[part][k])::"memory");   // made before the fence
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) Wgmma<N>::run(d + 64 * block, a[part] + 4 * step, b + (step0 + step) * 2);
        wgmma_commit();
      }
      if (first && quarter == R::AHEAD - 1) {
        first = false;
        if (warp < 4) asm volatile("bar.arrive 3, 256;" ::: "memory");
      }
      before = stage;
    }
    x_at.step(4);
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x(before);
}

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
__device__ __forceinline__ void grouped(char* memory, const void* tile_list, int items, const char* images, int capacity, Where where, Facts facts, Finish finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  const word barriers = shared_address(memory) + R::BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::X_STAGES; ++i) barrier_init(barriers + 8 * i, 1), barrier_init(barriers + 8 * (R::X_STAGES + i), MULTIPLIERS);
    for (int i = 0; i < R::W_STAGES; ++i) barrier_init(barriers + 8 * (2 * R::X_STAGES + i), WEIGHT_COPIERS), barrier_init(barriers + 8 * (2 * R::X_STAGES + R::W_STAGES + i), MULTIPLIERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  constexpr int FACTS = (R::TOKENS + 127) / 128;   // of a thread
  int x_count = 0, w_count = 0, rows, row_tile;
  if (warp >= MULTIPLIERS) {
    if (R::BLOCKS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS * SLICES, R::SLOTS>(tile_list, item, rows);
      const int slice = rows % SLICES, begin = UNITS * slice / SLICES, end = UNITS * (slice + 1) / SLICES;
      rows /= SLICES;
      if (warp > MULTIPLIERS) {
        const auto matrices = where(tile.expert, rows);
        copy_weights<R, UNITS>(shared_address(memory), matrices, begin, end, w_count, warp - MULTIPLIERS - 1, lane);
      } else if (lane == 0) {
        copy_x<R>(shared_address(memory), images + ((long long)begin * 4 * capacity + tile.first) * ATOM, (long long)capacity * ATOM, tile.slots, end - begin, x_count);
      }
    }
  } else {
    if (R::BLOCKS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    if (group == 1 && blockIdx.x < items) asm volatile("bar.sync 3, 256;" ::: "memory");   // behind the first, so that one's results are written while the other multiplies
    RingPlace<R::X_STAGES> x_at;
    RingPlace<R::W_STAGES> w_at;
    bool first = true;
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
        if constexpr (R::All::COUNT == 1) multiply_tile<decltype(n)::value, R>(d, memory, end - begin, x_at, w_at, first, warp, lane);
        else multiply_several<decltype(n)::value, R>(d, memory, ids, end - begin, x_at, w_at, first, warp, lane);
      };
      uint2 mine[FACTS];
#pragma unroll
      for (int i = 0; i < FACTS; ++i) {
        const int place = i * 128 + threadIdx.x % 128;
        mine[i] = place < tile.slots * 8 ? facts(tile.first * 8 + place) : make_uint2(0, 0);
      }
      if constexpr (ANY) multiply(Number<R::TOKENS>{});
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
