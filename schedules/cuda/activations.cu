// Activations on their way to tensor cores: read, guarded against overflow, put in the order of the codes they meet.
#ifndef MOQC_ACTIVATIONS
#define MOQC_ACTIVATIONS

namespace moqc {

__device__ __forceinline__ uint4 load_columns(const __half* p) { return load_now((const uint4*)p); }   // 8 columns
__device__ __forceinline__ uint4 load_columns(const float* p) {
  const float4 a = load_now((const float4*)p), b = load_now((const float4*)p + 1);
  const __half2 h[4] = {__floats2half2_rn(a.x, a.y), __floats2half2_rn(a.z, a.w), __floats2half2_rn(b.x, b.y), __floats2half2_rn(b.z, b.w)};
  return *(const uint4*)h;
}

// 2^shift that brings |largest| under 2048 (0 or more), and that power of two.
__device__ __forceinline__ int shift_of(float largest) { return max(0, (int)(__float_as_uint(largest) >> 23 & 255) - 127 - 10); }
__device__ __forceinline__ float power(int shift) { return __uint_as_float((127 + shift) << 23); }
__device__ __forceinline__ __half2 scaled(__half2 pair, float by) {
  const float2 values = __half22float2(pair);
  return __floats2half2_rn(values.x * by, values.y * by);
}
__device__ __forceinline__ __half2 scaled(float2 pair, float by) { return __floats2half2_rn(pair.x * by, pair.y * by); }
__device__ __forceinline__ float largest_of(__half2 pair) { return fmaxf(fabsf(__low2float(pair)), fabsf(__high2float(pair))); }
__device__ __forceinline__ float largest_of(float2 pair) { return fmaxf(fabsf(pair.x), fabsf(pair.y)); }
template <class T> struct PairOf;
template <> struct PairOf<__half> { using type = __half2; };
template <> struct PairOf<float> { using type = float2; };

// `mine`: a factor of this lane's token (lane / 4); returned: those of the accumulators' columns.
__device__ __forceinline__ float2 factors(float mine, int lane) {
  return make_float2(__shfl_sync(0xffffffffu, mine, lane % 4 * 8), __shfl_sync(0xffffffffu, mine, lane % 4 * 8 + 4));
}

// The lane's 64 of the unit's 256 columns: chunk v is columns first + 32 v + 8 (lane % 4) .. + 7 of `row`, zero from N on.
template <int N, class T> __device__ __forceinline__ void load_chunks(word* x, const T* row, int first, bool there, int lane) {
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int k = first + 32 * v + 8 * (lane % 4);
    uint4 values = {0, 0, 0, 0};
    if (there && (N % COLUMNS == 0 || k < N)) values = load_columns(row + k);
    x[4 * v] = values.x, x[4 * v + 1] = values.y, x[4 * v + 2] = values.z, x[4 * v + 3] = values.w;
  }
}
// The same; returns whether any of the warp's is too large.
template <int N, class T> __device__ __forceinline__ bool load_raw(word* x, const T* row, int first, bool there, int lane) {
  __half2 largest = __float2half2_rn(0.0f);
  load_chunks<N>(x, row, first, there, lane);
#pragma unroll
  for (int i = 0; i < 32; ++i) largest = __hmax2(largest, __habs2(*(const __half2*)&x[i]));
  return __any_sync(0xffffffffu, largest_of(largest) >= LIMIT);
}
// The power of two that large columns of the lane's token are to be divided by, from what may be beyond fp16.
template <int N, class T> __device__ __forceinline__ int shift_in(const T* row, int first, bool there, int lane) {
  using Pair = typename PairOf<T>::type;
  float most = 0.0f;
#pragma unroll 1
  for (int i = 0; i < 32; ++i) {
    const int k = first + 32 * (i / 4) + 8 * (lane % 4) + 2 * (i % 4);
    if (there && (N % COLUMNS == 0 || k < N)) most = fmaxf(most, largest_of(*(const Pair*)(row + k)));
  }
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
  return shift_of(most);
}
template <int N, class T> __device__ __forceinline__ void load_divided(word* x, const T* row, int first, bool there, int lane, int shift) {
  using Pair = typename PairOf<T>::type;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int k = first + 32 * (i / 4) + 8 * (lane % 4) + 2 * (i % 4);
    __half2 pair = __float2half2_rn(0.0f);
    if (there && (N % COLUMNS == 0 || k < N)) pair = scaled(*(const Pair*)(row + k), power(-shift));
    x[i] = *(const word*)&pair;
  }
}
// All of it. Returns what the products of the accumulators' two columns are to be multiplied by.
template <int N, class T> __device__ __forceinline__ float2 load_x(word* x, const T* row, int first, bool there, int lane) {
  if (!load_raw<N>(x, row, first, there, lane)) return make_float2(1.0f, 1.0f);
  const int shift = shift_in<N>(row, first, there, lane);
  load_divided<N>(x, row, first, there, lane, shift);
  return factors(power(shift), lane);
}

// The lane's columns 8 lane .. 8 lane + 7 of the unit, for one token.
template <int N> __device__ __forceinline__ void load_eight(float (&x)[8], const float* row, int first, int lane) {
  const int k = first + 8 * lane;
  float4 values[2] = {};
  if (N % COLUMNS == 0 || k < N) values[0] = load_now((const float4*)(row + k)), values[1] = load_now((const float4*)(row + k) + 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) x[4 * i] = values[i].x, x[4 * i + 1] = values[i].y, x[4 * i + 2] = values[i].z, x[4 * i + 3] = values[i].w;
}
template <int N> __device__ __forceinline__ void load_eight(float (&x)[8], const __half* row, int first, int lane) {
  const int k = first + 8 * lane;
  uint4 values = {0, 0, 0, 0};
  if (N % COLUMNS == 0 || k < N) values = load_columns(row + k);
  const word pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*(const __half2*)&pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// The same of activations that `route_and_halve` made: fp16, rows padded to whole units, none too large.
__device__ __forceinline__ void load_halves(word* x, const __half* row, int first, bool there, int lane) {
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    uint4 values = {0, 0, 0, 0};
    if (there) values = load_columns(row + first + 32 * v + 8 * (lane % 4));
    x[4 * v] = values.x, x[4 * v + 1] = values.y, x[4 * v + 2] = values.z, x[4 * v + 3] = values.w;
  }
}
template <class X> constexpr bool HALVES = false;   // what X* points to, if it is those
template <> constexpr bool HALVES<unsigned char> = true;

// The same from `hidden`, of which each 16 columns are divided by 2^shift: a byte each in `shifts`, 16 a unit; here the unit's.
template <int N> __device__ __forceinline__ uint4 load_shifts(const unsigned char* shifts, int first, bool there) {
  uint4 given = {0, 0, 0, 0};
  if (there) given = load_columns((const __half*)(shifts + first / ROWS));
  if (N % COLUMNS != 0) {   // nobody wrote the bytes past the last row tile
    const int tiles = (N + ROWS - 1) / ROWS - first / ROWS;
    const auto kept = [&](int i) {
      const int valid = min(max(tiles - 4 * i, 0), 4);
      return valid == 4 ? 0xffffffffu : (1u << (8 * valid)) - 1;
    };
    given.x &= kept(0), given.y &= kept(1), given.z &= kept(2), given.w &= kept(3);
  }
  return given;
}
__device__ __forceinline__ int largest_byte(uint4 bytes) {
  const word most = __vmaxu4(__vmaxu4(bytes.x, bytes.y), __vmaxu4(bytes.z, bytes.w));
  return max(max(most & 255, most >> 8 & 255), max(most >> 16 & 255, most >> 24));
}
// x, as it was loaded, made what it is times 2^-most.
__device__ __forceinline__ void apply_shifts(word* x, uint4 given, int most, int lane) {
  const word each[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const int shift = each[v / 2] >> (8 * (v % 2 * 2 + lane % 4 / 2)) & 255;
    const float by = power(max(shift - most, -126));
#pragma unroll
    for (int i = 4 * v; i < 4 * v + 4; ++i) {
      const __half2 pair = scaled(*(const __half2*)&x[i], by);
      x[i] = *(const word*)&pair;
    }
  }
}
template <int N> __device__ __forceinline__ void load_hidden_eight(float (&x)[8], const __half* row, const unsigned char* shifts, int first, int lane) {
  const int k = first + 8 * lane;
  const float by = power(N % COLUMNS == 0 || k < N ? *(const volatile unsigned char*)(shifts + k / ROWS) : 0);
  load_eight<N>(x, row, first, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= by;
}
template <int N> __device__ __forceinline__ float2 load_hidden(word* x, const __half* row, const unsigned char* shifts, int first, bool there, int lane) {
  const uint4 given = load_shifts<N>(shifts, first, there);
  load_chunks<N>(x, row, first, there, lane);
  if (!__any_sync(0xffffffffu, (given.x | given.y | given.z | given.w) != 0)) return make_float2(1.0f, 1.0f);
  const int most = largest_byte(given);
  apply_shifts(x, given, most, lane);
  return factors(power(most), lane);
}

}  // namespace moqc
#endif
