// Heads ahead of attention: queries and keys are normed and rotated, keys and values go into the cache, in fp16.
#ifndef MOQC_HEADS
#define MOQC_HEADS

namespace moqc {

// One head of one token, by one warp: x (* rsqrt(mean(x^2) + epsilon) * norm) (rotated by cos, sin over the first ROTARY).
template <int WIDTH, int ROTARY, bool NORM>
__device__ __forceinline__ void head(const float* x, const float* norm, float epsilon, const float* cosine, const float* sine, __half* out, float* room) {
  constexpr int EACH = (WIDTH + 31) / 32;
  const int lane = threadIdx.x % 32;
  float values[EACH], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = 32 * i + lane;
    values[i] = d < WIDTH ? x[d] : 0.0f;
    sum = fmaf(values[i], values[i], sum);
  }
  if (NORM) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    const float factor = rsqrtf(sum / WIDTH + epsilon);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (32 * i + lane < WIDTH) values[i] *= factor * norm[32 * i + lane];
  }
  if (ROTARY > 0) {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (32 * i + lane < WIDTH) room[32 * i + lane] = values[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int d = 32 * i + lane;
      if (d >= ROTARY || d >= WIDTH) continue;
      const float other = d < ROTARY / 2 ? -room[d + ROTARY / 2] : room[d - ROTARY / 2];
      values[i] = values[i] * cosine[d] + other * sine[d];
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (32 * i + lane < WIDTH) out[32 * i + lane] = __float2half(values[i]);
}

// HEAD_FIRST: inputs are [batch][head][token][width], else [batch][token][head][width]. Clears `done` for `attend`.
template <int QUERIES, int KEY_HEADS, int WIDTH, int VALUE_WIDTH, int ROTARY, bool NORM, bool HEAD_FIRST>
__device__ __forceinline__ void heads(const float* q, const float* k, const float* v, const void* positions, const float* q_norm, const float* k_norm,
                                      float epsilon, const float* cosine, const float* sine, int batch, int tokens, int context,
                                      void* queries, __half* k_cache, __half* v_cache, void* done) {
  constexpr int ALL = QUERIES + 2 * KEY_HEADS;
  __shared__ float room[4][WIDTH];
  start_next_kernel();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, job = blockIdx.x * 4 + warp;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < batch * KEY_HEADS; i += gridDim.x * blockDim.x) ((int*)done)[i] = 0;
  if (job >= batch * tokens * ALL) return;
  const int which = job % ALL, row = job / ALL, sequence = row / tokens, token = row % tokens;
  const auto input = [&](const float* from, int heads, int number, int width) {
    const long long at = HEAD_FIRST ? ((long long)sequence * heads + number) * tokens + token : (long long)row * heads + number;
    return from + at * width;
  };
  const float *turn = cosine + (long long)row * ROTARY, *lift = sine + (long long)row * ROTARY;
  if (which < QUERIES) {
    __half* const out = (__half*)queries + ((long long)row * QUERIES + which) * WIDTH;
    head<WIDTH, ROTARY, NORM>(input(q, QUERIES, which, WIDTH), q_norm, epsilon, turn, lift, out, room[warp]);
    return;
  }
  const long long position = ((const long long*)positions)[row];
  if (position < 0 || position >= context) return;   // padding
  const int number = (which - QUERIES) % KEY_HEADS;
  const long long slot = ((long long)sequence * KEY_HEADS + number) * context + position;
  if (which < QUERIES + KEY_HEADS)
    head<WIDTH, ROTARY, NORM>(input(k, KEY_HEADS, number, WIDTH), k_norm, epsilon, turn, lift, k_cache + slot * WIDTH, room[warp]);
  else
    head<VALUE_WIDTH, 0, false>(input(v, KEY_HEADS, number, VALUE_WIDTH), nullptr, 0.0f, nullptr, nullptr, v_cache + slot * VALUE_WIDTH, room[warp]);
}

}  // namespace moqc
#endif
