// Device code of moqc's grouped product for many tokens: Hopper's warp groups (sm_90a).
//
// Weights are the tensor core's operand A, in registers: a unit of layout mma16x256 is what a warp needs of it, so codes
// only have to become numbers. Activations are operand B, in shared memory. They lie in memory as *images*: for each 64
// columns and each slot (8 tokens of an expert, routing.cu) the 1024 bytes that the tensor core reads, columns in the
// order in which the codes come, so that a tile of up to 16 slots is one copy by the bulk copy engine.
//
// A block is two warp groups that multiply, each two blocks of 64 rows (gate and up of the same 64 outputs, or 128 rows of
// one matrix) by up to 128 tokens, and a third that copies ahead, and gives its registers to the others.
// Blocks stay, take tiles in turn, and their second group stays behind the first: one writes results while the other multiplies.
#ifndef MOQC_PREFILL
#define MOQC_PREFILL

namespace moqc {
#if __CUDA_ARCH_FEAT_SM90_ALL
// A warp's share of one tile: d[0] and d[1] = two blocks of 64 rows times N tokens. Codes are read 64 columns ahead, and
// weights made for 16 columns of a block at a time while the tensor core works on those before.
template <int N, class R> __device__ __forceinline__ void multiply_tile(float (&d)[2][64], char* memory, const int (&ids)[2], int units, RingPlace<R::X_STAGES>& x_at, RingPlace<R::W_STAGES>& w_at, bool& first, int warp, int lane) {
  using All = typename R::All;
  const word shared = shared_address(memory), barriers = shared + R::BARRIERS_AT;
  const auto release_x = [&](int stage) { barrier_arrive(barriers + 8 * (R::X_STAGES + stage)); };
  const char* const tiles = memory + R::W_AT + (warp / 4 * 8 + warp % 4) * R::TILE;
  Raw<All> raw[2];
  const auto load = [&](int quarter) {   // of the tile
    const word full = barriers + 8 * (2 * R::X_STAGES + w_at.stage), empty = full + 8 * R::W_STAGES;
    if (quarter % 4 == 0) barrier_wait(full, w_at.phase);
    const char* at = tiles + w_at.stage * R::W_BYTES;
#pragma unroll
    for (int block = 0; block < 2; ++block)
      with_format(All{}, ids[block], [&](auto format) { load_raw<decltype(format), All>(raw[block], at + block * (4 * R::TILE), quarter % 4, lane); });
    if (quarter % 4 == 3) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty);
      w_at.step();
    }
  };
  word a[2][4];
  const word magic = *(const volatile word*)(memory + R::MAGIC_AT);   // where the compiler does not know it: one instruction masks a code and puts it below
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[0][i] = d[1][i] = 0.0f;
  load(0);
  int before = 0;   // the stage before
#pragma unroll 1
  for (int quarter = 0; quarter < 4 * units; ++quarter) {
    Affine by[2][2];   // block of rows, half
#pragma unroll
    for (int block = 0; block < 2; ++block)
      with_format(All{}, ids[block], [&](auto format) {
        using F = decltype(format);
        by[block][0] = affine<F, All>(raw[block], 0);
        if constexpr (All::GROUPS == 8) by[block][1] = F::GROUP == 32 ? affine<F, All>(raw[block], 1) : by[block][0];
      });
    barrier_wait(barriers + 8 * x_at.stage, x_at.phase);
    const unsigned long long b = descriptor(shared + x_at.stage * R::X_BYTES);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int step = i / 2, block = i % 2;
      word(&w)[4] = a[i % 2];
      wgmma_wait<1>();   // its registers are free
      if (i == 1 && quarter > 0 && lane == 0) release_x(before);   // and so is the stage before
      with_format(All{}, ids[block], [&](auto format) { weights_of<decltype(format), All>(w, raw[block], by[block][All::GROUPS == 8 ? step / 2 : 0], magic, step); });
#pragma unroll
      for (int k = 0; k < 4; ++k) asm volatile("" : "+r"(w[k])::"memory");   // made before the fence
      wgmma_fence();
      Wgmma<N>::run(d[block], w, b + step * 2);
      wgmma_commit();
    }
    if (first && quarter == R::AHEAD - 1) {
      first = false;
      if (warp < 4) asm volatile("bar.arrive 3, 256;" ::: "memory");
    }
    before = x_at.stage, x_at.step();
    if (quarter + 1 < 4 * units) load(quarter + 1);
  }
  wgmma_wait<0>();
  __syncwarp();
  if (lane == 0) release_x(before);
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
    *(word*)(memory + R::MAGIC_AT) = 0x64006400u;
  }
  __syncthreads();
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
    uint2* known = (uint2*)(memory + R::FACTS_AT) + group * 128;
#pragma unroll 1
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Tokens tile = take<ROW_BLOCKS * SLICES, R::SLOTS>(tile_list, item, rows);
      const int slice = rows % SLICES, begin = UNITS * slice / SLICES, end = UNITS * (slice + 1) / SLICES;
      rows /= SLICES;
      const auto matrices = where(tile.expert, rows);
      const int ids[2] = {matrices(0, row_tile).id, matrices(4, row_tile).id};
      uint2 mine = make_uint2(0, 0);
      if (threadIdx.x % 128 < tile.slots * 8) mine = facts(tile.first * 8 + threadIdx.x % 128);
      const auto run = [&](auto n) {
        float d[2][64];
        multiply_tile<decltype(n)::value, R>(d, memory, ids, end - begin, x_at, w_at, first, warp, lane);
        group_sync(group);   // all have read the facts of the tile before
        known[threadIdx.x % 128] = mine;
        finish(d, tile, rows, slice, known, n);
      };
      if constexpr (ANY) {
        run(Number<R::SLOTS * 8>{});
      } else {
        if constexpr (R::SLOTS <= 5) {
if (tile.slots <= 3) run(Number<24>{});
 else run(Number<40>{});
        } else if constexpr (R::SLOTS <= 8) {   // of more than four ptxas would not overlap the products
          if (tile.slots <= 4) run(Number<32>{});
          else if (tile.slots == 5) run(Number<40>{});
          else if (tile.slots == 6) run(Number<48>{});
          else run(Number<64>{});
        } else if constexpr (R::SLOTS <= 12) {
          if (tile.slots <= 8) run(Number<64>{});
          else if (tile.slots == 9) run(Number<72>{});
          else if (tile.slots == 10) run(Number<80>{});
          else run(Number<96>{});
        } else {
          if (tile.slots <= 10) run(Number<80>{});
          else if (tile.slots <= 13) run(Number<104>{});
          else if (tile.slots <= 15) run(Number<120>{});
          else run(Number<128>{});
        }
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
  const auto facts = [&](int at) { return make_uint2(((const word*)share_list)[at], ((const word*)factor_list)[at]); };
  const auto finish = [&](float (&d)[2][64], const Tokens& tile, int rows, int slice, const uint2* known, auto n) {
#pragma unroll
    for (int block = 0; block < (L::GATED ? 1 : 2); ++block) {
      const int row0 = L::GATED ? rows * 128 + group * 64 : rows * 256 + group * 128 + block * 64;   // of 64
      if (threadIdx.x % 128 == 0) bulk_store_wait();   // until the image before has left
      group_sync(group);
#pragma unroll
      for (int atom = 0; atom < decltype(n)::value / 8; ++atom) {
        if (atom >= tile.slots) break;
        const int first = (tile.first + atom) * 8 + lane % 4 * 2;
        const uint4 both = *(const uint4*)(known + atom * 8 + lane % 4 * 2);
        const float2 share = make_float2(__uint_as_float(both.x), __uint_as_float(both.z)), factor = make_float2(__uint_as_float(both.y), __uint_as_float(both.w));
        float by0 = 1.0f, by1 = 1.0f;
        if (AGAIN) by0 = power(-shift_of(__uint_as_float(((const word*)over_list)[first]))), by1 = power(-shift_of(__uint_as_float(((const word*)over_list)[first + 1])));
        float values[2][2];   // row, token
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = row0 + warp % 4 * 16 + lane / 4 + 8 * i;
          const bool inside = L::I % 256 == 0 || row < L::I;
          float g = 0.0f, u = 0.0f;
          if ((L::BIASES & 1) && inside) g = ((const float*)gate_bias)[(long long)tile.expert * L::I + row];
          if ((L::BIASES & 2) && inside) u = ((const float*)up_bias)[(long long)tile.expert * L::I + row];
          const float* gates = d[L::GATED ? 0 : block] + 4 * atom + 2 * i;
          const float* ups = d[L::GATED ? 1 : block] + 4 * atom + 2 * i;
          values[i][0] = L::Activation::of(gates[0] * factor.x + g, ups[0] * factor.x + u) * share.x;
          values[i][1] = L::Activation::of(gates[1] * factor.y + g, ups[1] * factor.y + u) * share.y;
          if (!inside || share.x == 0.0f) values[i][0] = 0.0f;
          if (!inside || share.y == 0.0f) values[i][1] = 0.0f;
        }
        const float most0 = fmaxf(fabsf(values[0][0]), fabsf(values[1][0])), most1 = fmaxf(fabsf(values[0][1]), fabsf(values[1][1]));
        if (AGAIN) {
          values[0][0] *= by0, values[1][0] *= by0, values[0][1] *= by1, values[1][1] *= by1;
        } else if (fmaxf(most0, most1) >= 65504.0f) {
          if (most0 >= 65504.0f) atomicMax((word*)over_list + first, __float_as_uint(most0));
          if (most1 >= 65504.0f) atomicMax((word*)over_list + first + 1, __float_as_uint(most1));
          ((volatile int*)hit)[2] = 1;
        }
        word packed_rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 pair = both_rows(values[i][0], values[i][1], lane);
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
  grouped<R, UNITS, 1, ROW_BLOCKS, AGAIN>((char*)memory, tile_list, ((const int*)hit)[1] * ROW_BLOCKS, (const char*)x_images, capacity, where, facts, finish);
  if (threadIdx.x % 128 == 0) bulk_store_finish();
#endif
}

// y[token][H] += down x hidden + share * bias.
template <class L, class R, class Downs, class... Tensors>
__device__ __forceinline__ void down_grouped(void* memory, const void* tile_list, const void* hit, const void* hidden_images, const void* share_list, const void* member_list, const void* over_list,
                                             const int* table, const void* bias, float* y, int capacity, const Tensors*... packed) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int UNITS = (L::I + COLUMNS - 1) / COLUMNS, ROW_TILES = (L::H + ROWS - 1) / ROWS, ROW_BLOCKS = (L::H + 255) / 256;
  constexpr int SLICES = UNITS < 28 ? 1 : UNITS / 14;   // of columns: few experts are few tiles
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
  const auto facts = [&](int at) {
    const word over = ((const word*)over_list)[at];
    return make_uint2(((const word*)member_list)[at], over == 0 ? 0x3f800000u : __float_as_uint(power(shift_of(__uint_as_float(over)))));
  };
  const auto finish = [&](float (&d)[2][64], const Tokens& tile, int rows, int slice, const uint2* known, auto n) {
    group_sync(group);
#pragma unroll
    for (int atom = 0; atom < decltype(n)::value / 8; ++atom) {
      if (atom >= tile.slots) break;
      const int place = atom * 8 + lane % 4 * 2 + (lane >> 2 & 1);   // of the token that this lane writes
      const uint2 about = known[place];
      const int token = (int)about.x;
      const float factor = __uint_as_float(about.y);
      const float share = L::BIASES & 4 ? ((const float*)share_list)[tile.first * 8 + place] : 0.0f;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const int row = rows * 256 + group * 128 + block * 64 + warp % 4 * 16 + (lane / 4 & 4) + (lane & 8);   // and the next three
        const float2 low = both_rows(d[block][4 * atom], d[block][4 * atom + 1], lane), high = both_rows(d[block][4 * atom + 2], d[block][4 * atom + 3], lane);
        const bool upper = lane & 8;   // lanes g and g ^ 2 swap likewise: rows g & 4 to 3 more, or 8 above
        const float2 give = upper ? low : high, keep = upper ? high : low;
        const float2 got = make_float2(__shfl_xor_sync(0xffffffffu, give.x, 8), __shfl_xor_sync(0xffffffffu, give.y, 8));
        float4 sum = upper ? make_float4(got.x, got.y, keep.x, keep.y) : make_float4(keep.x, keep.y, got.x, got.y);
        if (token < 0 || (L::H % 256 != 0 && row >= L::H)) continue;
        sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
        if ((L::BIASES & 4) && slice == 0) {
          const float* b = (const float*)bias + (long long)tile.expert * L::H + row;
          sum.x += share * b[0], sum.y += share * b[1], sum.z += share * b[2], sum.w += share * b[3];
        }
        add4(y + (long long)token * L::H + row, sum);
      }
    }
  };
  grouped<R, UNITS, SLICES, ROW_BLOCKS, false>((char*)memory, tile_list, ((const int*)hit)[1] * (ROW_BLOCKS * SLICES), (const char*)hidden_images, capacity, where, facts, finish);
#endif
}

}  // namespace moqc
#endif
