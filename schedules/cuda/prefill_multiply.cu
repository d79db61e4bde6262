// What warp groups of the grouped product (prefill.cu) multiply: a tile of rows and tokens, of one format, of several, of few tokens.
#ifndef MOQC_PREFILL_MULTIPLY
#define MOQC_PREFILL_MULTIPLY

namespace moqc {
#if __CUDA_ARCH_FEAT_SM90_ALL
// A warp's share of one tile of one format: d = its rows of the warp group's EACH blocks of 64, times N tokens; block 1 from d[64] on. Codes are read
// 64 columns ahead, and weights made for 16 columns of a block at a time while the tensor core works on those before.
template <int N, class R> __device__ __forceinline__ void multiply_tile(float (&d)[128], char* memory, int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, bool& first, int warp, int lane) {
  using All = typename R::All;
  using F = typename All::First;
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
    for (int block = 0; block < EACH; ++block) load_raw<F, All>(raw[block], at + block * (4 * R::TILE), quarter, lane);
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
      if (64 * quarter % F::GROUP == 0) {
#pragma unroll
        for (int block = 0; block < EACH; ++block) {
          by[block][0] = affine<F, All>(raw[block], 0);
          by[block][1] = F::GROUP == 32 ? affine<F, All>(raw[block], 1) : by[block][0];
        }
      }
      const int stage = x_at.stage + quarter;
      barrier_wait(barriers + 8 * stage, x_at.phase);
      const unsigned long long b = descriptor(shared + stage * R::X_BYTES);
#pragma unroll
      for (int i = 0; i < 4 * EACH; ++i) {
        const int step = i / EACH, block = i % EACH;
        word(&weights)[4] = a[i % 2];
        wgmma_wait<1>();   // their registers are free
        if (i == 1 && (quarter > 0 || unit > 0) && lane == 0) release_x(before);   // and so is the stage before
        weights_of<F, All>(weights, raw[block], by[block][step / 2], step);
#pragma unroll
        for (int k = 0; k < 4; ++k) asm volatile("" : "+r"(weights[k])::"memory");   // made before the fence
        wgmma_fence();
        Wgmma<N>::run(d + 64 * block, weights, b + step * 2);
        wgmma_commit();
      }
      if (first && quarter == R::AHEAD - 1) {
        first = false;
        if (warp < 4) asm volatile("bar.arrive 5, 256;" ::: "memory");
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
        if (warp < 4) asm volatile("bar.arrive 5, 256;" ::: "memory");
      }
      before = stage;
    }
    x_at.step(4);
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x(before);
}

// The same for few tokens, with one block of 64 rows: products of 32 columns run together while weights of the next 32 are made. With few
// tokens it is how long products take that counts, and not the registers.
template <int N, class R> __device__ __forceinline__ void multiply_few(float (&d)[128], char* memory, int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, int warp, int lane) {
  using All = typename R::All;
  using F = typename All::First;
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const auto release_x = [&](int stage) { barrier_arrive(barriers + 8 * (R::X_STAGES + stage)); };
  const char* const tile = memory + R::W_AT + warp * R::TILE;
  Raw<All> raw[2];
  const auto load = [&](Raw<All>& to, int quarter) {   // of a unit
    const word full = barriers + 8 * (2 * R::X_STAGES + w_at.stage), empty = full + 8 * R::W_STAGES;
    if (quarter == 0) barrier_wait(full, w_at.phase);
    load_raw<F, All>(to, tile + w_at.stage * R::W_BYTES, quarter, lane);
    if (quarter == 3) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      w_at.step(1);
    }
  };
  word a[2][8];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
  load(raw[0], 0);
  Affine by[2];   // of a half
  int before = 0;   // the stage before
#pragma unroll 1
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int here = quarter % 2, stage = x_at.stage + quarter;
      if (quarter < 3) load(raw[here ^ 1], quarter + 1);
      else if (unit + 1 < units) load(raw[here ^ 1], 0);
      if (64 * quarter % F::GROUP == 0) {
        by[0] = affine<F, All>(raw[here], 0);
        by[1] = F::GROUP == 32 ? affine<F, All>(raw[here], 1) : by[0];
      }
      const unsigned long long b = descriptor(shared + stage * R::X_BYTES);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < 2; ++step) weights_of<F, All>(*(word(*)[4])(a[half] + 4 * step), raw[here], by[half], 2 * half + step);
#pragma unroll
        for (int k = 0; k < 8; ++k) asm volatile("" : "+r"(a[half][k])::"memory");   // made before the fence
        if (half == 0) barrier_wait(barriers + 8 * stage, x_at.phase);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) Wgmma<N>::run(d, a[half] + 4 * step, b + (2 * half + step) * 2);
        wgmma_commit();
        wgmma_wait<1>();   // those before: their registers are free
        if (half == 0 && (quarter > 0 || unit > 0) && lane == 0) release_x(before);   // and so is the stage before
      }
      before = stage;
    }
    x_at.step(4);
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x(before);
}
#endif

}  // namespace moqc
#endif
