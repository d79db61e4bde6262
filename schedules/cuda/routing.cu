// Which experts are hit, by which tokens: lists for the kernels of device.cu and prefill.cu.
//
// A *slot* is an expert and up to 8 of its tokens: slots[n] = expert, members[n][8] = token (-1: none), shares[n][8] = its
// weight (0: none); *hit = their number. An expert's slots follow one another, experts in rising order. Expert numbers out
// of range are ignored.
#ifndef MOQC_ROUTING
#define MOQC_ROUTING

namespace moqc {

// Up to 8 tokens: a slot for each expert, column c is token c. Weights of a token that names an expert twice add up.
template <int EXPERTS, int TOP, class Id>
__device__ __forceinline__ void route_few(const Id* ids, const float* weights, int tokens, int* slots, int* members, float* shares, int* hit) {
  __shared__ int counts[32];
  __shared__ int chosen_ids[8 * TOP];
  __shared__ float given[8 * TOP];
  for (int i = threadIdx.x; i < tokens * TOP; i += blockDim.x) {
    const Id id = ids[i];
    chosen_ids[i] = id >= 0 && id < EXPERTS ? (int)id : -1;
    given[i] = weights[i];
  }
  __syncthreads();
  const int expert = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float share[8];
  word mask = 0;   // tokens
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    share[token] = 0.0f;
    if (token < tokens)
      for (int j = 0; j < TOP; ++j)
        if (chosen_ids[token * TOP + j] == expert) mask |= 1u << token, share[token] += given[token * TOP + j];
  }
  const word ballot = __ballot_sync(0xffffffffu, mask != 0);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int slot = __popc(ballot & ((1u << lane) - 1)), total = 0;
  for (int i = 0; i < (EXPERTS + 31) / 32; ++i) {
    if (i < warp) slot += counts[i];
    total += counts[i];
  }
  if (mask != 0) {
    slots[slot] = expert;
#pragma unroll
    for (int token = 0; token < 8; ++token) {
      members[slot * 8 + token] = mask >> token & 1 ? token : -1;
      shares[slot * 8 + token] = share[token];
    }
  }
  if (threadIdx.x == 0) *hit = total;
}

// Any number of tokens: as many slots as an expert needs. The order of its tokens may change from run to run; no result
// depends on it.
template <int EXPERTS, int TOP, class Id>
__device__ __forceinline__ void route_many(const Id* ids, const float* weights, int tokens, int* slots, int* members, float* shares, int* hit) {
  __shared__ int counts[EXPERTS], starts[EXPERTS], sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pairs = tokens * TOP, expert = threadIdx.x;
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const Id id = ids[i];
    if (id >= 0 && id < EXPERTS) atomicAdd(&counts[(int)id], 1);
  }
  __syncthreads();
  const int count = expert < EXPERTS ? counts[expert] : 0, need = (count + 7) / 8;
  int before = need;   // becomes the inclusive sum over experts
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before += sums[i];
  if (threadIdx.x == blockDim.x - 1) *hit = before;
  if (expert < EXPERTS) {
    const int first = before - need;
    starts[expert] = first * 8, counts[expert] = 0;
    for (int i = 0; i < need; ++i) slots[first + i] = expert;
    for (int i = first * 8 + count; i < before * 8; ++i) members[i] = -1, shares[i] = 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const Id id = ids[i];
    if (id < 0 || id >= EXPERTS) continue;
    const int at = starts[(int)id] + atomicAdd(&counts[(int)id], 1);
    members[at] = i / TOP, shares[at] = weights[i];
  }
}

// One block of at least EXPERTS threads, whole warps.
template <int EXPERTS, int TOP, class Id>
__device__ __forceinline__ void route(const Id* ids, const float* weights, int tokens, void* slots, void* members, void* shares, void* hit) {
  wait_for_previous_kernel();
  start_next_kernel();
  if (tokens <= 8) route_few<EXPERTS, TOP>(ids, weights, tokens, (int*)slots, (int*)members, (float*)shares, (int*)hit);
  else route_many<EXPERTS, TOP>(ids, weights, tokens, (int*)slots, (int*)members, (float*)shares, (int*)hit);
}

}  // namespace moqc
#endif
