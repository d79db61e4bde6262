// Device code that prepares products for many tokens (prefill.cu, prefill_mma.cu, rows.cu): tiles of an expert's slots, and for the
// grouped product of warp groups all lists and the images of activations, in two launches of many blocks each.
#ifndef MOQC_GATHER
#define MOQC_GATHER

namespace moqc {

constexpr float HALF_LIMIT = 32768.0f;   // activations from here on are divided by a power of two

// A tile of tokens: some of an expert's slots. `group`: the first of the expert's tiles, `groups` how many it has.
struct Tokens { int expert, group, groups, first, slots; };

// Lists the tiles, from the slots that `route` listed: one block of whole warps, EXPERTS threads or more.
template <int EXPERTS, int TILE_SLOTS> __device__ __forceinline__ void list_tiles(const void* slot_list, void* hit_and_tiles, void* tile_list) {
  __shared__ int counts[EXPERTS], starts[EXPERTS], sums[32];
  wait_for_previous_kernel();
  start_next_kernel();
  const int* slots = (const int*)slot_list;
  const int hit = *(const int*)hit_and_tiles, expert = threadIdx.x;
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < hit; i += blockDim.x) {
    atomicAdd(&counts[slots[i]], 1);
    if (i == 0 || slots[i - 1] != slots[i]) starts[slots[i]] = i;
  }
  __syncthreads();
  const int count = expert < EXPERTS ? counts[expert] : 0, need = (count + TILE_SLOTS - 1) / TILE_SLOTS;
  const int before = sum_up_to(need, sums);
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

// ---------------------------------------------------------------------------------------------- images
constexpr int GATHER_TOKENS = 2, GATHER_WARPS = 8;   // of a block of `place_and_gather`; warps share a token
template <int TOP> struct Counted {   // tokens of a block of `count_pairs`
  static constexpr int TOKENS = largest(1024 / TOP / GATHER_TOKENS * GATHER_TOKENS, GATHER_TOKENS);
};

// counts[block][expert] = the block's pairs of that expert; ranks[pair] = how many of them come before this one, -1 where
// the expert's number is out of range. The order within a block may change from run to run; no result depends on it.
template <int EXPERTS, int TOP, class Id> __device__ __forceinline__ void count_pairs(const Id* ids, int tokens, void* ranks, void* counts) {
  __shared__ int found[EXPERTS];
  wait_for_previous_kernel();
  start_next_kernel();
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) found[i] = 0;
  __syncthreads();
  const int begin = blockIdx.x * Counted<TOP>::TOKENS * TOP, end = min(begin + Counted<TOP>::TOKENS * TOP, tokens * TOP);
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const Id id = ids[i];
    ((int*)ranks)[i] = id >= 0 && id < EXPERTS ? atomicAdd(&found[(int)id], 1) : -1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) ((int*)counts)[blockIdx.x * EXPERTS + i] = found[i];
}

// What `place` wants to know of an expert: how many pairs it has, and how many of them come before those that this block (of `place_and_gather`) ranks.
struct Pairs { int all, before; };

// From what `count_pairs`, the kernel ahead, has found; it ranks the pairs of its blocks.
template <int EXPERTS, int TOP> __device__ __forceinline__ Pairs counted(const int* counts, int tokens, int expert) {
  const int blocks = (tokens + Counted<TOP>::TOKENS - 1) / Counted<TOP>::TOKENS, mine = blockIdx.x * GATHER_TOKENS / Counted<TOP>::TOKENS;
  Pairs result = {0, 0};
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) {
    const int here = counts[block * EXPERTS + expert];
    result.all += here, result.before += block < mine ? here : 0;
  }
  return result;
}

// The same without a kernel ahead, where pairs are few: every block counts them all, and ranks those of its own tokens.
template <int EXPERTS, int TOP, class Id> __device__ __forceinline__ void count_here(const Id* ids, int tokens, Pairs (&pairs)[EXPERTS], int (&ranks)[GATHER_TOKENS * TOP]) {
  const int mine = blockIdx.x * GATHER_TOKENS * TOP, end = tokens * TOP;
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) pairs[i] = {0, 0};
  __syncthreads();
  for (int i = threadIdx.x; i < end; i += blockDim.x) {
    const Id id = ids[i];
    if (id < 0 || id >= EXPERTS) continue;
    atomicAdd(&pairs[(int)id].all, 1);
    if (i < mine) atomicAdd(&pairs[(int)id].before, 1);
  }
  for (int at = threadIdx.x; at < GATHER_TOKENS * TOP; at += blockDim.x) {
    const Id id = mine + at < end ? ids[mine + at] : -1;
    int rank = id >= 0 && id < EXPERTS ? 0 : -1;
    for (int i = 0; i < at && rank >= 0; ++i) rank += ids[mine + i] == id;
    ranks[at] = rank;
  }
  __syncthreads();
}

// starts[expert] = where this block's pairs of it begin among the members. Block 0 lists tiles of up to TILE_SLOTS slots, and
// clears what an expert's last slot has too much; hit = slots, tiles, and 0.
template <int EXPERTS, int TILE_SLOTS, class Count>
__device__ __forceinline__ void place(int (&starts)[EXPERTS], Count count_of, int* members, float* shares, int* hit, Tokens* tiles) {
  constexpr int EACH = (EXPERTS + GATHER_WARPS * 32 - 1) / (GATHER_WARPS * 32);   // experts of a thread
  __shared__ long long sums[GATHER_WARPS];
  Pairs pairs[EACH];
  int need_slots = 0, need_tiles = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int expert = threadIdx.x * EACH + i;
    pairs[i] = expert < EXPERTS ? count_of(expert) : Pairs{0, 0};
    const int slots = (pairs[i].all + 7) / 8;
    need_slots += slots, need_tiles += (slots + TILE_SLOTS - 1) / TILE_SLOTS;
  }
  const long long both = sum_up_to((long long)need_tiles << 32 | need_slots, sums);
  int slot = (int)both, tile = (int)(both >> 32);
  if (blockIdx.x == 0 && threadIdx.x == blockDim.x - 1) hit[0] = slot, hit[1] = tile, hit[2] = 0;
  slot -= need_slots, tile -= need_tiles;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int expert = threadIdx.x * EACH + i, slots = (pairs[i].all + 7) / 8, groups = (slots + TILE_SLOTS - 1) / TILE_SLOTS;
    if (expert >= EXPERTS) break;
    starts[expert] = slot * 8 + pairs[i].before;
    if (blockIdx.x == 0) {
      for (int k = 0; k < groups; ++k) tiles[tile + k] = {expert, tile, groups, slot, slots};
      for (int k = slot * 8 + pairs[i].all; k < (slot + slots) * 8; ++k) members[k] = -1, shares[k] = 0.0f;
    }
    slot += slots, tile += groups;
  }
  __syncthreads();
}

// Lists of slots and of tiles, and the images of x. Rows that reach HALF_LIMIT are divided by the power of two in
// `factors`. `over` is cleared. COUNTED: after `count_pairs`. Images of an expert's last slot have any values where it has no token.
template <int EXPERTS, int TOP, int H, int TILE_SLOTS, bool COUNTED, class Id, class X>
__device__ __forceinline__ void place_and_gather(const X* x, const Id* ids, const float* weights, int tokens, const void* ranks, const void* counts, void* members, void* shares, void* hit,
                                                 void* tiles, void* images, void* factors, void* over, int capacity) {
  using Pair = typename PairOf<X>::type;
  constexpr int CHUNKS = (H + COLUMNS - 1) / COLUMNS * 32, WARPS = GATHER_WARPS / GATHER_TOKENS;   // of 8 columns, of a row; of a token
  constexpr int EACH = (CHUNKS + 32 * WARPS - 1) / (32 * WARPS);   // of a thread
  __shared__ int starts[EXPERTS];
  __shared__ float found[GATHER_WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x * GATHER_TOKENS + warp / WARPS, thread = warp % WARPS * 32 + lane;
  const bool inside = token < tokens;
  if (!COUNTED) wait_for_previous_kernel(), start_next_kernel();
  Pair held[EACH][4];   // as the image has them; `count_pairs`, the kernel ahead, has waited for those before it, which make x
  float most = 0.0f;
#pragma unroll
  for (int e = 0; e < EACH; ++e)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = e * 32 * WARPS + thread, k = i / 8 * 64 + i % 8 / 4 * 32 + 8 * q + i % 4 * 2;
      held[e][q] = inside && k < H ? *(const Pair*)(x + (long long)token * H + k) : Pair{};
    }
#pragma unroll
  for (int i = 0; i < 4 * EACH; ++i) most = fmaxf(most, largest_of(held[i / 4][i % 4]));
#pragma unroll
  for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, other));
  if (lane == 0) found[warp] = most;
  if (COUNTED) wait_for_previous_kernel(), start_next_kernel();
  __shared__ Pairs pairs[COUNTED ? 1 : EXPERTS];
  __shared__ int own_ranks[GATHER_TOKENS * TOP];
  if constexpr (!COUNTED) count_here<EXPERTS, TOP>(ids, tokens, pairs, own_ranks);
  const auto count_of = [&](int expert) { return COUNTED ? counted<EXPERTS, TOP>((const int*)counts, tokens, expert) : pairs[COUNTED ? 0 : expert]; };
  place<EXPERTS, TILE_SLOTS>(starts, count_of, (int*)members, (float*)shares, (int*)hit, (Tokens*)tiles);
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) most = fmaxf(most, found[warp / WARPS * WARPS + i]);
  const int shift = most < HALF_LIMIT ? 0 : shift_of(most);
  const float by = power(-shift);
  char* to[TOP];   // the token's row of each of its experts' images
  int row[TOP];
#pragma unroll
  for (int i = 0; i < TOP; ++i) {
    const int pair = token * TOP + i, rank = COUNTED ? ((const int*)ranks)[pair] : own_ranks[warp / WARPS * TOP + i];
    to[i] = nullptr, row[i] = 0;
    if (rank < 0) continue;
    const int at = starts[(int)ids[pair]] + rank;
    row[i] = at % 8, to[i] = (char*)images + (long long)(at / 8) * ATOM + at % 8 * 128;
    if (thread == 0) {
      ((int*)members)[at] = token, ((float*)shares)[at] = weights[pair];
      ((float*)factors)[at] = power(shift), ((word*)over)[at] = 0;
    }
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int i = e * 32 * WARPS + thread, block = i / 8, chunk = i % 8;
    if (i >= CHUNKS) break;
    word words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const __half2 pair = scaled(held[e][q], by);
      words[q] = *(const word*)&pair;
    }
#pragma unroll
    for (int j = 0; j < TOP; ++j)
      if (to[j] != nullptr) *(uint4*)(to[j] + (long long)block * capacity * ATOM + (chunk ^ row[j]) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace moqc
#endif
