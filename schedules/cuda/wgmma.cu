// What the grouped product (prefill.cu) uses of Hopper's own instructions (sm_90a): barriers in shared memory, the bulk
// copy engine, and the product of a warp group.
#ifndef MOQC_WGMMA_CU
#define MOQC_WGMMA_CU

namespace moqc {

constexpr int ATOM = 1024;   // bytes of an image: 8 tokens x 64 columns

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
__device__ __forceinline__ void add4(float* p, float4 v) { asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory"); }
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// d += a (64 rows x 16) times b (16 x N); b is named by a descriptor.
template <int N> struct Wgmma;
#define MOQC_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOQC_D8(i) MOQC_D4(i), MOQC_D4(i + 4)
#define MOQC_D32(i) MOQC_D8(i), MOQC_D8(i + 8), MOQC_D8(i + 16), MOQC_D8(i + 24)
#define MOQC_WGMMA(N, REGISTERS, A, ...)                                                                          \
  template <> struct Wgmma<N> {                                                                                   \
    __device__ __forceinline__ static void run(float* d, const word* a, unsigned long long b) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS "}, {" A ", p, 1, 1, 0;\n}" \
                   : __VA_ARGS__                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
    }                                                                                                             \
  };
#define MOQC_R4_0 "%0,%1,%2,%3"
#define MOQC_R4_1 MOQC_R4_0 ",%4,%5,%6,%7"
#define MOQC_R4_2 MOQC_R4_1 ",%8,%9,%10,%11"
#define MOQC_R4_3 MOQC_R4_2 ",%12,%13,%14,%15"
#define MOQC_R4_4 MOQC_R4_3 ",%16,%17,%18,%19"
#define MOQC_R4_5 MOQC_R4_4 ",%20,%21,%22,%23"
#define MOQC_R4_6 MOQC_R4_5 ",%24,%25,%26,%27"
#define MOQC_R4_7 MOQC_R4_6 ",%28,%29,%30,%31"
#define MOQC_R4_8 MOQC_R4_7 ",%32,%33,%34,%35"
#define MOQC_R4_9 MOQC_R4_8 ",%36,%37,%38,%39"
#define MOQC_R4_10 MOQC_R4_9 ",%40,%41,%42,%43"
#define MOQC_R4_11 MOQC_R4_10 ",%44,%45,%46,%47"
#define MOQC_R4_12 MOQC_R4_11 ",%48,%49,%50,%51"
#define MOQC_R4_13 MOQC_R4_12 ",%52,%53,%54,%55"
#define MOQC_R4_14 MOQC_R4_13 ",%56,%57,%58,%59"
#define MOQC_R4_15 MOQC_R4_14 ",%60,%61,%62,%63"
#define MOQC_R4_16 MOQC_R4_15 ",%64,%65,%66,%67"
#define MOQC_R4_17 MOQC_R4_16 ",%68,%69,%70,%71"
#define MOQC_R4_18 MOQC_R4_17 ",%72,%73,%74,%75"
#define MOQC_R4_19 MOQC_R4_18 ",%76,%77,%78,%79"
#define MOQC_R4_20 MOQC_R4_19 ",%80,%81,%82,%83"
#define MOQC_R4_21 MOQC_R4_20 ",%84,%85,%86,%87"
#define MOQC_R4_22 MOQC_R4_21 ",%88,%89,%90,%91"
#define MOQC_R4_23 MOQC_R4_22 ",%92,%93,%94,%95"
#define MOQC_R4_24 MOQC_R4_23 ",%96,%97,%98,%99"
#define MOQC_R4_25 MOQC_R4_24 ",%100,%101,%102,%103"
#define MOQC_R4_26 MOQC_R4_25 ",%104,%105,%106,%107"
#define MOQC_R4_27 MOQC_R4_26 ",%108,%109,%110,%111"
#define MOQC_R4_28 MOQC_R4_27 ",%112,%113,%114,%115"
#define MOQC_R4_29 MOQC_R4_28 ",%116,%117,%118,%119"
#define MOQC_R4_30 MOQC_R4_29 ",%120,%121,%122,%123"
#define MOQC_R4_31 MOQC_R4_30 ",%124,%125,%126,%127"
MOQC_WGMMA(8, MOQC_R4_0, "%4,%5,%6,%7}, %8", MOQC_D4(0))
MOQC_WGMMA(16, MOQC_R4_1, "%8,%9,%10,%11}, %12", MOQC_D8(0))
MOQC_WGMMA(24, MOQC_R4_2, "%12,%13,%14,%15}, %16", MOQC_D8(0), MOQC_D4(8))
MOQC_WGMMA(32, MOQC_R4_3, "%16,%17,%18,%19}, %20", MOQC_D8(0), MOQC_D8(8))
MOQC_WGMMA(40, MOQC_R4_4, "%20,%21,%22,%23}, %24", MOQC_D8(0), MOQC_D8(8), MOQC_D4(16))
MOQC_WGMMA(48, MOQC_R4_5, "%24,%25,%26,%27}, %28", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16))
MOQC_WGMMA(64, MOQC_R4_7, "%32,%33,%34,%35}, %36", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24))
MOQC_WGMMA(72, MOQC_R4_8, "%36,%37,%38,%39}, %40", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D4(32))
MOQC_WGMMA(80, MOQC_R4_9, "%40,%41,%42,%43}, %44", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D8(32))
MOQC_WGMMA(96, MOQC_R4_11, "%48,%49,%50,%51}, %52", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D8(32), MOQC_D8(40))
MOQC_WGMMA(104, MOQC_R4_12, "%52,%53,%54,%55}, %56", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D8(32), MOQC_D8(40), MOQC_D4(48))
MOQC_WGMMA(120, MOQC_R4_14, "%60,%61,%62,%63}, %64", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D8(32), MOQC_D8(40), MOQC_D8(48), MOQC_D4(56))
MOQC_WGMMA(128, MOQC_R4_15, "%64,%65,%66,%67}, %68", MOQC_D8(0), MOQC_D8(8), MOQC_D8(16), MOQC_D8(24), MOQC_D8(32), MOQC_D8(40), MOQC_D8(48), MOQC_D8(56))
MOQC_WGMMA(136, MOQC_R4_16, "%68,%69,%70,%71}, %72", MOQC_D32(0), MOQC_D32(32), MOQC_D4(64))
MOQC_WGMMA(160, MOQC_R4_19, "%80,%81,%82,%83}, %84", MOQC_D32(0), MOQC_D32(32), MOQC_D8(64), MOQC_D8(72))
MOQC_WGMMA(192, MOQC_R4_23, "%96,%97,%98,%99}, %100", MOQC_D32(0), MOQC_D32(32), MOQC_D32(64))
MOQC_WGMMA(208, MOQC_R4_25, "%104,%105,%106,%107}, %108", MOQC_D32(0), MOQC_D32(32), MOQC_D32(64), MOQC_D8(96))
MOQC_WGMMA(232, MOQC_R4_28, "%116,%117,%118,%119}, %120", MOQC_D32(0), MOQC_D32(32), MOQC_D32(64), MOQC_D8(96), MOQC_D8(104), MOQC_D4(112))
MOQC_WGMMA(256, MOQC_R4_31, "%128,%129,%130,%131}, %132", MOQC_D32(0), MOQC_D32(32), MOQC_D32(64), MOQC_D32(96))

// The same of bytes: d += (or =, without `keep`) a (64 rows x 32, unsigned) times b (32 x N, signed).
template <int N> struct WgmmaBytes;
#define MOQC_I4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define MOQC_I8(i) MOQC_I4(i), MOQC_I4(i + 4)
#define MOQC_WGMMA_BYTES(N, REGISTERS, A, KEEP, ...)                                                              \
  template <> struct WgmmaBytes<N> {                                                                              \
    __device__ __forceinline__ static void run(int* d, const word* a, unsigned long long b, int keep) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP ", 0;\n"                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.u8.s8 {" REGISTERS "}, {" A ", p;\n}"          \
                   : __VA_ARGS__                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                              \
    }                                                                                                             \
  };
MOQC_WGMMA_BYTES(16, MOQC_R4_1, "%8,%9,%10,%11}, %12", "%13", MOQC_I8(0))
MOQC_WGMMA_BYTES(32, MOQC_R4_3, "%16,%17,%18,%19}, %20", "%21", MOQC_I8(0), MOQC_I8(8))
MOQC_WGMMA_BYTES(48, MOQC_R4_5, "%24,%25,%26,%27}, %28", "%29", MOQC_I8(0), MOQC_I8(8), MOQC_I8(16))
MOQC_WGMMA_BYTES(64, MOQC_R4_7, "%32,%33,%34,%35}, %36", "%37", MOQC_I8(0), MOQC_I8(8), MOQC_I8(16), MOQC_I8(24))

// An image's descriptor: rows of 128 bytes, swizzled; 8 rows every ATOM bytes.
__device__ __forceinline__ unsigned long long descriptor(word shared) {
  return (unsigned long long)((shared & 0x3ffff) >> 4) | (1ull << 16) | ((unsigned long long)(ATOM >> 4) << 32) | (1ull << 62);
}
#endif

}  // namespace moqc
#endif
