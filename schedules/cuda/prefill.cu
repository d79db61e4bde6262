// Device code of moqc's grouped product for many tokens: Hopper's warp groups (sm_90a).
//
// Weights are the tensor core's operand A, in registers: a unit of layout mma16x256 is what a warp needs of it, so codes
// only have to become numbers. Activations are operand B, in shared memory. They lie in memory as *images*: for each 64
// columns and each slot (8 tokens of an expert, routing.cu) the 1024 bytes that the tensor core reads, columns in the
// order in which the codes come, so that a tile of up to 16 slots is one copy by the bulk copy engine.
//
// A block is two warp groups that multiply, each two blocks of 64 rows (gate and up of the same 64 outputs, or 128 rows of
// one matrix) by up to 128 tokens, and a third that copies ahead, and gives its registers to the others.
// Blocks stay, and take tiles in turn.
#ifndef MOQC_PREFILL
#define MOQC_PREFILL

namespace moqc {

constexpr int ATOM = 1024;                     // bytes of an image: 8 tokens x 64 columns
constexpr int MULTIPLIERS = 8;                 // warps; of four more, one copies activations
constexpr int WEIGHT_COPIERS = 3;              // and three weights
constexpr float HALF_LIMIT = 32768.0f;         // activations from here on are divided by a power of two

// ---------------------------------------------------------------------------------------------- instructions
__device__ __forceinline__ word shared_address(const void* p) { return (word)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(word barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_wait(word barrier, int parity) {
  asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_arrive(word barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void barrier_expect(word barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void bulk_copy(word shared, const void* p, int bytes, word barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(p), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void bulk_store(void* p, word shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(p), "r"(shared), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_store_finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void fence_for_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void add2(float* p, float a, float b) { asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(a), "f"(b) : "memory"); }
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// d += a (64 rows x 16) times b (16 x N); b is named by a descriptor.
template <int N> struct Wgmma;
#define MOQC_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOQC_D16(i) MOQC_D4(i), MOQC_D4(i + 4), MOQC_D4(i + 8), MOQC_D4(i + 12)
#define MOQC_WGMMA(N, REGISTERS, A, ...)                                                                          \
  template <> struct Wgmma<N> {                                                                                   \
    __device__ __forceinline__ static void run(float* d, const word* a, unsigned long long b) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS "}, {" A ", p, 1, 1, 0;\n}" \
                   : __VA_ARGS__                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
    }                                                                                                             \
  };
#define MOQC_R16_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MOQC_R16_1 MOQC_R16_0 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOQC_R16_2 MOQC_R16_1 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define MOQC_R16_3 MOQC_R16_2 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
MOQC_WGMMA(32, MOQC_R16_0, "%16,%17,%18,%19}, %20", MOQC_D16(0))
MOQC_WGMMA(64, MOQC_R16_1, "%32,%33,%34,%35}, %36", MOQC_D16(0), MOQC_D16(16))
MOQC_WGMMA(96, MOQC_R16_2, "%48,%49,%50,%51}, %52", MOQC_D16(0), MOQC_D16(16), MOQC_D16(32))
MOQC_WGMMA(128, MOQC_R16_3, "%64,%65,%66,%67}, %68", MOQC_D16(0), MOQC_D16(16), MOQC_D16(32), MOQC_D16(48))

// An image's descriptor: rows of 128 bytes, swizzled; 8 rows every ATOM bytes.
__device__ __forceinline__ unsigned long long descriptor(word shared) {
  return (unsigned long long)((shared & 0x3ffff) >> 4) | (1ull << 16) | ((unsigned long long)(ATOM >> 4) << 32) | (1ull << 62);
}
#endif

// ---------------------------------------------------------------------------------------------- decoding
// The lane's codes of 64 columns as bytes: word i is a pair of columns; row g in bytes 0 and 2, row g + 8 in 1 and 3.
template <int BITS> __device__ __forceinline__ void to_bytes(word (&c)[8], const char* unit, int quarter, int lane) {
  const auto at = [&](int i, int from) { return *(const word*)(unit + i / 4 * 512 + from * 16 + i % 4 * 4); };
  if constexpr (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 w = *(const uint4*)(unit + (2 * quarter + i) * 512 + lane * 16);
      c[4 * i] = w.x, c[4 * i + 1] = w.y, c[4 * i + 2] = w.z, c[4 * i + 3] = w.w;
    }
  } else if constexpr (BITS == 4) {
    const uint4 v = *(const uint4*)(unit + quarter * 512 + lane * 16);
    const word w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = w[i / 2] >> (4 * (i % 2)) & 0x0f0f0f0fu;
  } else if constexpr (BITS == 2) {
    const uint2 v = *(const uint2*)(unit + quarter / 2 * 512 + lane * 16 + quarter % 2 * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = (i < 4 ? v.x : v.y) >> (2 * (i % 4)) & 0x03030303u;
  } else if constexpr (BITS == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const word w = *(const word*)(unit + (lane / 4 * 4 + i) * 16 + quarter * 4) >> (2 * (lane % 4));
      const word bytes = __byte_perm(w, 0, 0x3120);
      c[i] = bytes & 0x01010101u, c[i + 4] = bytes >> 1 & 0x01010101u;
    }
  } else {
    const word q0 = at(3 * quarter, lane), q1 = at(3 * quarter + 1, lane), q2 = at(3 * quarter + 2, lane);
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const word w = i < 2 ? q0 : i < 4 ? q1 : q2;
      c[i] = (w >> (3 * (i % 2)) & 0x00070007u) | (w >> (1 + 3 * (i % 2)) & 0x07000700u);
    }
    c[6] = (q0 >> 6 & 0x00070007u) | (q1 << 2 & 0x07000700u);
    c[7] = (q2 >> 6 & 0x00070007u) | (q0 >> 7 & 0x01000100u) | (q1 >> 6 & 0x02000200u) | (q2 >> 5 & 0x04000400u);
  }
}

// What a group multiplies codes by, and adds: rows g and g + 8.
struct Affine { __half2 scale[2], offset[2]; };
template <class F> __device__ __forceinline__ Affine affine(const char* scales, const char* zeros, int column, int lane) {
  const int at = (lane / 4 * F::GROUPS + column / F::GROUP) * 2;
  word stored = F::BYTES ? *(const unsigned short*)(scales + at) : *(const word*)(scales + 2 * at);
  const __half2 scale = scale_of<F>(&stored, 0);
  Affine result;
  result.scale[0] = __low2half2(scale), result.scale[1] = __high2half2(scale);
  if constexpr (F::SYMMETRIC) {
    const __half2 zero = __float2half2_rn(-F::ZERO);
    result.offset[0] = __hmul2(result.scale[0], zero), result.offset[1] = __hmul2(result.scale[1], zero);
  } else {
    const uchar2 zero = *(const uchar2*)(zeros + at);
    const float2 exact = __half22float2(scale);
    result.offset[0] = __float2half2_rn(exact.x * (-F::ZERO_STEP * zero.x)), result.offset[1] = __float2half2_rn(exact.y * (-F::ZERO_STEP * zero.y));
  }
  return result;
}

// Operand A of 16 columns: pairs 2 * step and 2 * step + 1 of the 8 in c.
__device__ __forceinline__ void weights_of(word* a, const word (&c)[8], const Affine& by, int step) {
  const __half2 magic = __float2half2_rn(-1024.0f);
#pragma unroll
  for (int i = 0; i < 4; ++i) {   // row i % 2 of pair i / 2
    const word code = __byte_perm(c[2 * step + i / 2], 0x64646464u, i % 2 ? 0x4341 : 0x4240);   // 1024 + code
    const __half2 weight = __hfma2(__hadd2(*(const __half2*)&code, magic), by.scale[i % 2], by.offset[i % 2]);
    a[i] = *(const word*)&weight;
  }
}

// ---------------------------------------------------------------------------------------------- tiles
// A tile of tokens: some of an expert's slots. `group`: the first of the expert's tiles, `groups` how many it has.
struct Tokens { int expert, group, groups, first, slots; };

// Lists the tiles, from the slots that `route` listed: one block of whole warps, EXPERTS threads or more.
template <int EXPERTS, int TILE_SLOTS> __device__ __forceinline__ void list_tiles(const void* slot_list, void* hit_and_tiles, void* tile_list) {
  __shared__ int counts[EXPERTS], starts[EXPERTS], sums[32];
  wait_for_previous_kernel();
  start_next_kernel();
  const int* slots = (const int*)slot_list;
  const int hit = *(const int*)hit_and_tiles, lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = threadIdx.x;
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < hit; i += blockDim.x) {
    atomicAdd(&counts[slots[i]], 1);
    if (i == 0 || slots[i - 1] != slots[i]) starts[slots[i]] = i;
  }
  __syncthreads();
  const int count = expert < EXPERTS ? counts[expert] : 0, need = (count + TILE_SLOTS - 1) / TILE_SLOTS;
  int before = need;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before += sums[i];
  if (threadIdx.x == blockDim.x - 1) ((int*)hit_and_tiles)[1] = before, ((int*)hit_and_tiles)[2] = 0;
  Tokens* tiles = (Tokens*)tile_list;
  for (int i = 0; i < need; ++i) tiles[before - need + i] = {expert, before - need, need, starts[expert], count};
}

// Item `item` of all (tile of tokens, one of ROW_BLOCKS): an expert's tiles of tokens follow one another for each of its
// row blocks, so that weights are read from memory once. `tile.first` and `tile.slots` become the tile's own.
template <int ROW_BLOCKS, int TILE_SLOTS> __device__ __forceinline__ Tokens take(const void* tile_list, int item, int& rows) {
  Tokens tile = ((const Tokens*)tile_list)[item / ROW_BLOCKS];
  const int local = item - tile.group * ROW_BLOCKS, number = local % tile.groups;
  rows = local / tile.groups;
  const int begin = tile.slots * number / tile.groups, end = tile.slots * (number + 1) / tile.groups;
  tile.first += begin, tile.slots = end - begin;
  return tile;
}

// ---------------------------------------------------------------------------------------------- activations in
// The images of x, a block for each slot, a warp for each token; y [tokens][H] is cleared. Rows that reach HALF_LIMIT are
// divided by the power of two in `factors`. `over` is cleared.
template <int H, class X>
__device__ __forceinline__ void gather(const X* x, int tokens, const void* member_list, const void* hit, void* images, void* factor_list, void* over_list, int capacity, float* y) {
  using Pair = typename PairOf<X>::type;
  constexpr int BLOCKS = (H + COLUMNS - 1) / COLUMNS * 4;   // of 64 columns
  wait_for_previous_kernel();
  start_next_kernel();
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (long long)tokens * H; i += (long long)gridDim.x * blockDim.x) y[i] = 0.0f;
  const int slot = blockIdx.x, row = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (slot >= *(const int*)hit) return;
  const int token = ((const int*)member_list)[slot * 8 + row];
  const X* from = x + (long long)max(token, 0) * H;
  float most = 0.0f;
#pragma unroll 8
  for (int k = 2 * lane; k < (token >= 0 ? H : 0); k += 64) most = fmaxf(most, largest_of(*(const Pair*)(from + k)));
#pragma unroll
  for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
  const int shift = most < HALF_LIMIT ? 0 : shift_of(most);
  if (lane == 0) ((float*)factor_list)[slot * 8 + row] = power(shift), ((word*)over_list)[slot * 8 + row] = 0;
  const float by = power(-shift);
#pragma unroll 4
  for (int i = lane; i < BLOCKS * 8; i += 32) {   // chunks of 8 columns, as the image has them
    const int block = i / 8, chunk = i % 8;
    word words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int k = 64 * block + chunk / 4 * 32 + 8 * q + chunk % 4 * 2;
      __half2 pair = __float2half2_rn(0.0f);
      if (token >= 0 && k < H) pair = scaled(*(const Pair*)(from + k), by);
      words[q] = *(const word*)&pair;
    }
    char* image = (char*)images + ((long long)block * capacity + slot) * ATOM;
    *(uint4*)(image + row * 128 + (chunk ^ row) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// ---------------------------------------------------------------------------------------------- the product
// Shared memory of a block: the ring of activations, 64 columns a stage; that of weights, a unit of all 16 row tiles a
// stage, each with scales and zeros; two images' worth for results; barriers.
template <int SLOTS_, int GROUP_, int BUFFERS_, int X_STAGES_, int W_STAGES_, class All_> struct Rings {
  using All = All_;
  static constexpr int SLOTS = SLOTS_;   // of a tile of tokens, at most
  static constexpr int GROUP = GROUP_, BUFFERS = BUFFERS_;   // see multiply_tile
  static constexpr int X_STAGES = X_STAGES_, W_STAGES = W_STAGES_, X_BYTES = SLOTS_ * ATOM;
  static constexpr int SCALES = All::GROUPS * 32, ZEROS = All::HAS_ZEROS ? All::GROUPS * 16 : 0;   // of a row tile
  static constexpr int TILE = All::BITS * 512 + SCALES + ZEROS, W_BYTES = 16 * TILE;
  static constexpr int W_AT = X_STAGES * X_BYTES, OUT_AT = W_AT + W_STAGES * W_BYTES, BARRIERS_AT = OUT_AT + 2 * X_BYTES;
};

template <int VALUE> struct Number { static constexpr int value = VALUE; };

// A matrix of one expert: where its tiles are, and its format.
struct Matrix { const char *codes, *scales, *zeros; int id; };
template <class... Fs> __device__ __forceinline__ Matrix matrix_of(Formats<Fs...>, const void* const* tensors, int2 place, long long units) {
  Matrix result = {nullptr, nullptr, nullptr, 0};
  int number = 0;
  (((sizeof...(Fs) == 1 || place.x == number)
        ? (result = {(const char*)tensors[3 * number] + place.y * units * (Fs::BITS * 512), (const char*)tensors[3 * number + 1] + place.y * units * (Fs::GROUPS * 16 * Fs::SCALE),
                     (const char*)tensors[3 * number + 2] + place.y * units * (Fs::GROUPS * 16), Fs::ID}, 0)
        : 0, ++number), ...);
  return result;
}

#if __CUDA_ARCH_FEAT_SM90_ALL
// The copying warp group's share of one tile: its first warp fetches the activations, 64 columns at a time, the others
// UNITS units of weights: of 16 row tiles, which are rows of matrix `first` or, every second four, of `second`.
template <class R, int UNITS>
__device__ __forceinline__ void copy_x(word shared, const char* images, long long block_stride, int slots, int& count) {
  const word barriers = shared + R::BARRIERS_AT;
#pragma unroll 1
  for (int block = 0; block < 4 * UNITS; ++block, ++count) {
    const int stage = count % R::X_STAGES;
    const word full = barriers + 8 * stage, empty = full + 8 * R::X_STAGES;
    barrier_wait(empty, (count / R::X_STAGES & 1) ^ 1);
    barrier_expect(full, slots * ATOM);
    bulk_copy(shared + stage * R::X_BYTES, images + block * block_stride, slots * ATOM, full);
  }
}
template <class R, int UNITS, class Where> __device__ __forceinline__ void copy_weights(word shared, Where where, int& count, int warp, int lane) {
  const word barriers = shared + R::BARRIERS_AT;
  const int number = warp + WEIGHT_COPIERS * lane;   // of 16 row tiles, a lane each
  int row_tile = 0, bytes = 0;
  Matrix matrix = {nullptr, nullptr, nullptr, 0};
  if (number < 16) {
    matrix = where(number, row_tile);
    with_format(typename R::All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      bytes = F::BITS * 512 + F::GROUPS * (16 * F::SCALE + (F::SYMMETRIC ? 0 : 16));
    });
  }
#pragma unroll
  for (int other = 4; other > 0; other /= 2) bytes += __shfl_xor_sync(0xffffffffu, bytes, other);   // of lanes 0 to 7
#pragma unroll 1
  for (int unit = 0; unit < UNITS; ++unit, ++count) {
    const int stage = count % R::W_STAGES;
    const word full = barriers + 8 * (2 * R::X_STAGES + stage), empty = full + 8 * R::W_STAGES;
    barrier_wait(empty, (count / R::W_STAGES & 1) ^ 1);
    if (lane == 0) barrier_expect(full, bytes);
    __syncwarp();
    if (number < 16) with_format(typename R::All{}, matrix.id, [&](auto format) {
      using F = decltype(format);
      const long long at = (long long)row_tile * UNITS + unit;
      const word to = shared + R::W_AT + stage * R::W_BYTES + number * R::TILE, scales = to + R::All::BITS * 512;
      bulk_copy(to, matrix.codes + at * (F::BITS * 512), F::BITS * 512, full);
      bulk_copy(scales, matrix.scales + at * (F::GROUPS * 16 * F::SCALE), F::GROUPS * 16 * F::SCALE, full);
      if (!F::SYMMETRIC) bulk_copy(scales + R::SCALES, matrix.zeros + at * (F::GROUPS * 16), F::GROUPS * 16, full);
    });
  }
}

// A warp's share of one tile: d[0] and d[1] = two blocks of 64 rows times N tokens. Weights are made for GROUP steps of 16
// columns at a time, into one of BUFFERS, while the tensor core works on those before.
template <int N, int GROUP, int BUFFERS, class R, int UNITS> __device__ __forceinline__ void multiply_tile(float (&d)[2][64], char* memory, const int (&ids)[2], int& x_count, int& w_count, int warp, int lane) {
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const auto release_x = [&] { barrier_arrive(barriers + 8 * (R::X_STAGES + (x_count - 1) % R::X_STAGES)); };
  word a[BUFFERS][GROUP][2][4];   // step, block of rows
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[0][i] = d[1][i] = 0.0f;
#pragma unroll 1
  for (int unit = 0; unit < UNITS; ++unit) {
    const int stage = w_count % R::W_STAGES;
    const word full = barriers + 8 * (2 * R::X_STAGES + stage), empty = full + 8 * R::W_STAGES;
    barrier_wait(full, w_count / R::W_STAGES & 1);
    ++w_count;
    const char* tiles = memory + R::W_AT + stage * R::W_BYTES + (warp / 4 * 8 + warp % 4) * R::TILE;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      word c[2][8];
      Affine by[2][2];   // block of rows, half
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const char* tile = tiles + block * (4 * R::TILE);
        with_format(typename R::All{}, ids[block], [&](auto format) {
          using F = decltype(format);
          to_bytes<F::BITS>(c[block], tile, quarter, lane);
          const char *scales = tile + R::All::BITS * 512, *zeros = scales + R::SCALES;
          by[block][0] = affine<F>(scales, zeros, 64 * quarter, lane);
          by[block][1] = F::GROUP == 32 ? affine<F>(scales, zeros, 64 * quarter + 32, lane) : by[block][0];
        });
      }
      if (quarter == 3) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty);
      }
      const int x_stage = x_count % R::X_STAGES;
      barrier_wait(barriers + 8 * x_stage, x_count / R::X_STAGES & 1);
      const unsigned long long b = descriptor(shared + x_stage * R::X_BYTES);
#pragma unroll
      for (int group = 0; group < 4 / GROUP; ++group) {
        wgmma_wait<BUFFERS - 1>();   // its registers are free
        if (group == BUFFERS - 1 && (unit > 0 || quarter > 0) && lane == 0) release_x();   // and so is the stage before
        word(&w)[GROUP][2][4] = a[group % BUFFERS];
#pragma unroll
        for (int step = 0; step < GROUP; ++step)
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            const int at = group * GROUP + step;
            weights_of(w[step][block], c[block], by[block][at / 2], at);
#pragma unroll
            for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(w[step][block][i])::"memory");   // made before the fence
          }
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < GROUP; ++step)
#pragma unroll
          for (int block = 0; block < 2; ++block) Wgmma<N>::run(d[block], w[step][block], b + (group * GROUP + step) * 2);
        wgmma_commit();
      }
      ++x_count;
    }
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x();
}

// Lanes g and g ^ 1 of 8 (rows) swap, so that each has both rows of one of two tokens.
__device__ __forceinline__ float2 both_rows(float token0, float token1, int lane) {
  const bool odd = lane & 4;
  const float other = __shfl_xor_sync(0xffffffffu, odd ? token0 : token1, 4);
  return odd ? make_float2(other, token1) : make_float2(token0, other);
}

// The frame of both products: `finish(d, tile, rows, n)` takes a tile's results, n tokens of them computed.
template <class R, int UNITS, int ROW_BLOCKS, class Where, class Finish>
__device__ __forceinline__ void grouped(char* memory, const void* tile_list, int items, const char* images, int capacity, Where where, Finish finish) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const word barriers = shared_address(memory) + R::BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::X_STAGES; ++i) barrier_init(barriers + 8 * i, 1), barrier_init(barriers + 8 * (R::X_STAGES + i), MULTIPLIERS);
    for (int i = 0; i < R::W_STAGES; ++i) barrier_init(barriers + 8 * (2 * R::X_STAGES + i), WEIGHT_COPIERS), barrier_init(barriers + 8 * (2 * R::X_STAGES + R::W_STAGES + i), MULTIPLIERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int x_count = 0, w_count = 0, rows, row_tile;
  if (warp >= MULTIPLIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS, R::SLOTS>(tile_list, item, rows);
      if (warp > MULTIPLIERS) {
        const auto matrices = where(tile.expert, rows);
        copy_weights<R, UNITS>(shared_address(memory), matrices, w_count, warp - MULTIPLIERS - 1, lane);
      } else if (lane == 0) {
        copy_x<R, UNITS>(shared_address(memory), images + (long long)tile.first * ATOM, (long long)capacity * ATOM, tile.slots, x_count);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS, R::SLOTS>(tile_list, item, rows);
      const auto matrices = where(tile.expert, rows);
      const int ids[2] = {matrices(0, row_tile).id, matrices(4, row_tile).id};
      float d[2][64];
      const auto run = [&](auto n) {
        multiply_tile<decltype(n)::value, R::GROUP, R::BUFFERS, R, UNITS>(d, memory, ids, x_count, w_count, warp, lane);
        finish(d, tile, rows, n);
      };
      if constexpr (R::SLOTS <= 4) {
        run(Number<32>{});
      } else {
        if (tile.slots <= 4) run(Number<32>{});
        else if (tile.slots <= 8) run(Number<64>{});
        else if (tile.slots <= 12) run(Number<96>{});
        else run(Number<128>{});
      }
    }
  }
}
#endif

// The images of hidden = share * act(gate x + bias, up x + bias) in fp16. A value beyond fp16 is noted in `over` (the
// largest of its token), and hit[2] set; the launch after this one (AGAIN) then makes all images once more, divided.
template <class L, class R, bool AGAIN, class Gates, class Ups, class... Tensors>
__device__ __forceinline__ void gate_up_grouped(void* memory, const void* tile_list, void* hit, const void* x_images, const void* factor_list, const void* share_list, void* over_list,
                                                const int* table, const void* gate_bias, const void* up_bias, void* hidden_images, int capacity, const Tensors*... packed) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int UNITS = (L::H + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::I + ROWS - 1) / ROWS;
  constexpr int EACH = L::GATED ? 128 : 256, ROW_BLOCKS = ((L::I + COLUMNS - 1) / COLUMNS * COLUMNS + EACH - 1) / EACH;   // zeros for `down` up to whole units
  wait_for_previous_kernel();
  start_next_kernel();
  if (AGAIN && ((const int*)hit)[2] == 0) return;
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  char* out = (char*)memory + R::OUT_AT + group * R::X_BYTES;
  const auto where = [&](int expert, int rows) {
    constexpr long long EACH = (long long)ROW_TILES * UNITS;
    const int2 second_at = Ups::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + L::EXPERTS + expert);
    const Matrix second = matrix_of(Ups{}, tensors + 3 * Gates::COUNT, second_at, EACH);
    Matrix first = second;
    if constexpr (L::GATED) first = matrix_of(Gates{}, tensors, Gates::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + expert), EACH);
    return [=](int number, int& row_tile) {   // of 16 row tiles
      row_tile = min(L::GATED ? rows * 8 + number / 8 * 4 + number % 4 : rows * 16 + number, ROW_TILES - 1);
      return L::GATED && number % 8 < 4 ? first : second;
    };
  };
  const auto finish = [&](float (&d)[2][64], const Tokens& tile, int rows, auto n) {
    constexpr int N = decltype(n)::value;
#pragma unroll
    for (int block = 0; block < (L::GATED ? 1 : 2); ++block) {
      const int row0 = L::GATED ? rows * 128 + group * 64 : rows * 256 + group * 128 + block * 64;   // of 64
      if (threadIdx.x % 128 == 0) bulk_store_wait();   // until the image before has left
      group_sync(group);
#pragma unroll
      for (int atom = 0; atom < N / 8; ++atom) {
        const int first = (tile.first + atom) * 8 + lane % 4 * 2;
        if (atom >= tile.slots) continue;
        const float2 share = *(const float2*)((const float*)share_list + first), factor = *(const float2*)((const float*)factor_list + first);
        float by0 = 1.0f, by1 = 1.0f;
        if (AGAIN) by0 = power(-shift_of(__uint_as_float(((const word*)over_list)[first]))), by1 = power(-shift_of(__uint_as_float(((const word*)over_list)[first + 1])));
        word packed_rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = row0 + warp % 4 * 16 + lane / 4 + 8 * i;
          const bool inside = row < L::I;
          float g = 0.0f, u = 0.0f;
          if ((L::BIASES & 1) && inside) g = ((const float*)gate_bias)[(long long)tile.expert * L::I + row];
          if ((L::BIASES & 2) && inside) u = ((const float*)up_bias)[(long long)tile.expert * L::I + row];
          const float* gates = d[L::GATED ? 0 : block] + 4 * atom + 2 * i;
          const float* ups = d[L::GATED ? 1 : block] + 4 * atom + 2 * i;
          float v0 = L::Activation::of(gates[0] * factor.x + g, ups[0] * factor.x + u) * share.x;
          float v1 = L::Activation::of(gates[1] * factor.y + g, ups[1] * factor.y + u) * share.y;
          if (!inside || share.x == 0.0f) v0 = 0.0f;
          if (!inside || share.y == 0.0f) v1 = 0.0f;
          if (AGAIN) {
            v0 *= by0, v1 *= by1;
          } else if (fabsf(v0) >= 65504.0f || fabsf(v1) >= 65504.0f) {
            if (fabsf(v0) >= 65504.0f) atomicMax((word*)over_list + first, __float_as_uint(fabsf(v0)));
            if (fabsf(v1) >= 65504.0f) atomicMax((word*)over_list + first + 1, __float_as_uint(fabsf(v1)));
            ((volatile int*)hit)[2] = 1;
          }
          const float2 pair = both_rows(v0, v1, lane);
          const __half2 rounded = __floats2half2_rn(pair.x, pair.y);
          packed_rows[i] = *(const word*)&rounded;
        }
        const int token = lane % 4 * 2 + (lane >> 2 & 1), chunk = warp % 4 / 2 * 4 + lane / 8;
        *(uint2*)(out + atom * ATOM + token * 128 + (chunk ^ token) * 16 + warp % 2 * 8) = make_uint2(packed_rows[0], packed_rows[1]);
      }
      fence_for_bulk();
      group_sync(group);
      if (threadIdx.x % 128 == 0)
        bulk_store((char*)hidden_images + ((long long)(row0 / 64) * capacity + tile.first) * ATOM, shared_address(out), tile.slots * ATOM);
    }
  };
  grouped<R, UNITS, ROW_BLOCKS>((char*)memory, tile_list, ((const int*)hit)[1] * ROW_BLOCKS, (const char*)x_images, capacity, where, finish);
  if (threadIdx.x % 128 == 0) bulk_store_finish();
#endif
}

// y[token][H] += down x hidden + share * bias.
template <class L, class R, class Downs, class... Tensors>
__device__ __forceinline__ void down_grouped(void* memory, const void* tile_list, const void* hit, const void* hidden_images, const void* share_list, const void* member_list, const void* over_list,
                                             const int* table, const void* bias, float* y, int capacity, const Tensors*... packed) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, ROW_BLOCKS = (L::H + 255) / 256;
  wait_for_previous_kernel();
  const void* const tensors[] = {packed...};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  const auto where = [&](int expert, int rows) {
    const int2 place = Downs::COUNT == 1 ? make_int2(0, expert) : __ldg((const int2*)table + 2 * L::EXPERTS + expert);
    const Matrix matrix = matrix_of(Downs{}, tensors, place, (long long)ROW_TILES * UNITS);
    return [=](int number, int& row_tile) {
      row_tile = min(rows * 16 + number, ROW_TILES - 1);
      return matrix;
    };
  };
  const auto finish = [&](float (&d)[2][64], const Tokens& tile, int rows, auto n) {
    constexpr int N = decltype(n)::value;
#pragma unroll
    for (int atom = 0; atom < N / 8; ++atom) {
      if (atom >= tile.slots) continue;
      const int place = (tile.first + atom) * 8 + lane % 4 * 2 + (lane >> 2 & 1);   // of the token that this lane writes
      const int token = ((const int*)member_list)[place];
      const word over = ((const word*)over_list)[place];
      const float factor = over == 0 ? 1.0f : power(shift_of(__uint_as_float(over)));
      const float share = L::BIASES & 4 ? ((const float*)share_list)[place] : 0.0f;
#pragma unroll
      for (int block = 0; block < 2; ++block)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = rows * 256 + group * 128 + block * 64 + warp % 4 * 16 + (lane / 4 & 6) + 8 * i;   // and the next
          float2 sum = both_rows(d[block][4 * atom + 2 * i], d[block][4 * atom + 2 * i + 1], lane);
          if (token < 0 || row >= L::H) continue;
          sum.x *= factor, sum.y *= factor;
          if (L::BIASES & 4) {
            const float* b = (const float*)bias + (long long)tile.expert * L::H + row;
            sum.x += share * b[0], sum.y += share * b[1];
          }
          add2(y + (long long)token * L::H + row, sum.x, sum.y);
        }
    }
  };
  grouped<R, UNITS, ROW_BLOCKS>((char*)memory, tile_list, ((const int*)hit)[1] * ROW_BLOCKS, (const char*)hidden_images, capacity, where, finish);
#endif
}

}  // namespace moqc
#endif
