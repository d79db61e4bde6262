// Which experts are hit, by which tokens: lists for the kernels of decode.cu, rows.cu and prefill.cu.
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
  const int pairs = tokens * TOP, expert = threadIdx.x;
  for (int i = threadIdx.x; i < EXPERTS; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const Id id = ids[i];
    if (id >= 0 && id < EXPERTS) atomicAdd(&counts[(int)id], 1);
  }
  __syncthreads();
  const int count = expert < EXPERTS ? counts[expert] : 0, need = (count + 7) / 8;
  const int before = sum_up_to(need, sums);
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

// The same by block 0; every other block makes the fp16 copy of a token's activations, padded with zeros to whole units and
// divided by the power of two in `factors` where they reach LIMIT, and clears its y.
template <int EXPERTS, int TOP, int H, class Id, class X>
__device__ __forceinline__ void route_and_halve(const Id* ids, const float* weights, int tokens, void* slots, void* members, void* shares, void* hit,
                                                const X* x, void* halves, void* factors, float* y) {
  if (blockIdx.x == 0) {
    route<EXPERTS, TOP>(ids, weights, tokens, slots, members, shares, hit);
    return;
  }
  constexpr int PADDED = (H + COLUMNS - 1) / COLUMNS * COLUMNS;
  __shared__ float found[32];
  wait_for_previous_kernel();
  start_next_kernel();
  const long long token = blockIdx.x - 1;
  const X* row = x + token * H;
  float most = 0.0f;
  for (int k = threadIdx.x; k < H; k += blockDim.x) most = fmaxf(most, fabsf((float)row[k])), y[token * H + k] = 0.0f;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; ++i) most = fmaxf(most, found[i]);
  const int shift = shift_of(most);
  for (int k = threadIdx.x; k < PADDED; k += blockDim.x) ((__half*)halves)[token * PADDED + k] = __float2half(k < H ? (float)row[k] * power(-shift) : 0.0f);
  if (threadIdx.x == 0) ((float*)factors)[token] = power(shift);
}

// Keeps of each token's experts those that are worth their work, see moqc/quant/routing.py: a warp a token, a lane a pair.
// What is dropped gets the id -1 and the weight 0. limits: limit, peak, margin; slopes [EXPERTS][H] or null.
template <int EXPERTS, int TOP, int H, bool MASS, bool RENORMALIZE, class Id>
__device__ __forceinline__ void prune(int tokens, float exponent, long long first, const float* x, const Id* ids, const float* weights, const void* positions,
                                      const float* strength, const float* limits, const __half* slopes, Id* kept_ids, float* kept_weights) {
  static_assert(TOP <= 32, "a lane a pair");
  wait_for_previous_kernel();
  start_next_kernel();
  const int lane = threadIdx.x % 32, token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= tokens) return;
  float peak = 0.0f;
  for (int k = lane; k < H; k += 32) peak = fmaxf(peak, fabsf(x[(long long)token * H + k]));
#pragma unroll
  for (int other = 16; other > 0; other /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, other));
  const long long position = ((const long long*)positions)[token], at = (long long)token * TOP + lane;
  const Id id = lane < TOP ? ids[at] : (Id)-1;
  const float share = lane < TOP ? weights[at] : 0.0f;
  float score = 0.0f;
  if (id >= 0 && id < EXPERTS) {
    score = fabsf(share) * strength[(int)id];
    score = exponent == 2.0f ? score * score : exponent == 1.0f ? score : powf(score, exponent);
  }
  if (slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < TOP; ++i) {
      const Id expert = __shfl_sync(0xffffffffu, id, i);
      if (expert < 0 || expert >= EXPERTS) continue;  // the same for all lanes
      float gain = 0.0f;
      for (int k = lane; k < H; k += 32) gain += x[(long long)token * H + k] * __half2float(slopes[(long long)expert * H + k]);
#pragma unroll
      for (int other = 16; other > 0; other /= 2) gain += __shfl_xor_sync(0xffffffffu, gain, other);
      if (lane == i) score *= expf(gain);
    }
  }
  float largest = 0.0f, highest = 0.0f, second = 0.0f, total = 0.0f;
#pragma unroll
  for (int i = 0; i < TOP; ++i) {
    const float weight = __shfl_sync(0xffffffffu, share, i), size = fabsf(weight);
    largest = fmaxf(largest, __shfl_sync(0xffffffffu, score, i));
    second = fmaxf(second, fminf(highest, size)), highest = fmaxf(highest, size);
    total += weight;
  }
  const float margin = TOP == 1 ? 1.0f : (highest - second) / fmaxf(highest + second, 1.1754943508222875e-38f);
  const float bound = MASS ? fminf(limits[0], largest) : limits[0] * largest;
  const bool safe = position < first || peak > limits[1] || margin < limits[2], worth = score >= bound;
  const bool stays = position >= 0 && score > 0.0f && (safe || worth);
  float left = stays ? share : 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < TOP; ++i) sum += __shfl_sync(0xffffffffu, left, i);
  if (RENORMALIZE && sum != 0.0f) left *= total / sum;
  if (lane < TOP) kept_ids[at] = stays ? id : (Id)-1, kept_weights[at] = left;
}

template <int EXPERTS, int TOP, int H, bool MASS, bool RENORMALIZE, class Id>
__device__ __forceinline__ void prune(int tokens, float exponent, long long first, const float* x, const Id* ids, const float* weights, const void* positions,
                                      const float* strength, const float* limits, Id* kept_ids, float* kept_weights) {
  const __half* none = nullptr;
  prune<EXPERTS, TOP, H, MASS, RENORMALIZE>(tokens, exponent, first, x, ids, weights, positions, strength, limits, none, kept_ids, kept_weights);
}

}  // namespace moqc
#endif
