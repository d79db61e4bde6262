/* What AMX products leave of a core: cycles (of the clock's nominal 2.7 GHz, or -DGHZ=) of vector instructions
 * alone and beside tile products, and of products of 16 x 16 x 64 with their loads and stores.
 *
 *     gcc -O2 -march=sapphirerapids benchmarks/amx_ports.c -o /tmp/amx_ports && /tmp/amx_ports
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef GHZ
#define GHZ 2.7
#endif

static _Alignas(4096) int8_t X[1 << 18], W[1 << 14];
static _Alignas(4096) int32_t sums[4096];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* The least of many times, a machine with other work being the rule. */
#define CYCLES(count, body)                                       \
    ({                                                            \
        double best = 1e9;                                        \
        for (int round = 0; round < 400; round++) {               \
            double start = now();                                 \
            for (int turn = 0; turn < 500; turn++) { body; }      \
            double seconds = now() - start;                       \
            if (seconds < best) best = seconds;                   \
        }                                                         \
        best / 500 * GHZ * 1e9 / (count);                         \
    })

#define EIGHT(op)                                                                                      \
    op "%%zmm30, %%zmm31, %%zmm8\n" op "%%zmm30, %%zmm31, %%zmm9\n" op "%%zmm30, %%zmm31, %%zmm10\n"   \
    op "%%zmm30, %%zmm31, %%zmm11\n" op "%%zmm30, %%zmm31, %%zmm12\n" op "%%zmm30, %%zmm31, %%zmm13\n" \
    op "%%zmm30, %%zmm31, %%zmm14\n" op "%%zmm30, %%zmm31, %%zmm15\n"
#define VECTORS(op)                                                                                     \
    asm volatile(EIGHT(op) EIGHT(op) EIGHT(op) EIGHT(op)::: "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
                 "xmm13", "xmm14", "xmm15")
#define BESIDE(tile, op) _tile_dpbsud(tile, 4, 6); VECTORS(op);
#define COMPARE(op)                                                                        \
    printf("32 x %-12s alone %5.1f, beside a product %5.1f\n", op, CYCLES(1, VECTORS(op)), \
           CYCLES(4, BESIDE(0, op) BESIDE(1, op) BESIDE(2, op) BESIDE(3, op)))

/* 48 rows of 2,048 activations from the second-level cache times two blocks, sums stored after 128 columns. */
static void products(int stores) {
    for (int column = 0; column < 2048; column += 128)
        for (int tile = 0; tile < 3; tile++) {
            _tile_zero(0);
            _tile_zero(1);
            for (int part = 0; part < 128; part += 64) {
                _tile_loadd(4, X + tile * 16 * 2048 + column + part, 2048);
                _tile_loadd(5, W + part * 16, 64);
                _tile_dpbsud(0, 4, 5);
                _tile_loadd(6, W + 8192 + part * 16, 64);
                _tile_dpbsud(1, 4, 6);
            }
            if (!stores) continue;
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + 256, 64);
        }
}

int main(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t width[16]; uint8_t rows[16]; } shapes = {1};
    for (int tile = 0; tile < 8; tile++) shapes.width[tile] = 64, shapes.rows[tile] = 16;
    syscall(SYS_arch_prctl, 0x1023, 18);
    _tile_loadconfig(&shapes);
    COMPARE("vfmadd231ps ");
    COMPARE("vmulps ");
    COMPARE("vpmaddwd ");
    COMPARE("vaddps ");
    COMPARE("vpaddd ");
    for (int random = 0; random < 2; random++) {
        for (size_t i = 0; random && i < sizeof X; i++) X[i] = rand();
        for (size_t i = 0; random && i < sizeof W; i++) W[i] = rand() % 16;
        double plain = 50 * CYCLES(192, if (turn % 50 == 0) products(0));
        double stored = 50 * CYCLES(192, if (turn % 50 == 0) products(1));
        printf("a product of %s: %.1f, with its sums stored every second time %.1f\n",
               random ? "random numbers" : "zeros", plain, stored);
    }
    return 0;
}
