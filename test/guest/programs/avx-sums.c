// Keeps sums in all sixteen YMM registers (and, where the CPU has AVX-512, in ZMM registers and a mask register) over
// many context switches. Prints "avx sums right" or which register is wrong. Two of these at once would spoil each
// other's registers if a kernel or its monitor did not save them.
#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ROUNDS 200000000ull

static uint64_t result[16][4];
static uint64_t wide[16][8];

// Register n starts as seed + n in every lane and grows by n + 1 a round.
static void sums(const uint64_t (*start)[4], const uint64_t (*step)[4]) {
  uint64_t rounds = ROUNDS;
  __asm__ volatile(
      "vmovdqu 0(%1), %%ymm0; vmovdqu 32(%1), %%ymm1; vmovdqu 64(%1), %%ymm2; vmovdqu 96(%1), %%ymm3\n"
      "vmovdqu 128(%1), %%ymm4; vmovdqu 160(%1), %%ymm5; vmovdqu 192(%1), %%ymm6; vmovdqu 224(%1), %%ymm7\n"
      "vmovdqu 256(%1), %%ymm8; vmovdqu 288(%1), %%ymm9; vmovdqu 320(%1), %%ymm10; vmovdqu 352(%1), %%ymm11\n"
      "vmovdqu 384(%1), %%ymm12; vmovdqu 416(%1), %%ymm13; vmovdqu 448(%1), %%ymm14; vmovdqu 480(%1), %%ymm15\n"
      "1: vpaddq 0(%2), %%ymm0, %%ymm0; vpaddq 32(%2), %%ymm1, %%ymm1; vpaddq 64(%2), %%ymm2, %%ymm2\n"
      "vpaddq 96(%2), %%ymm3, %%ymm3; vpaddq 128(%2), %%ymm4, %%ymm4; vpaddq 160(%2), %%ymm5, %%ymm5\n"
      "vpaddq 192(%2), %%ymm6, %%ymm6; vpaddq 224(%2), %%ymm7, %%ymm7; vpaddq 256(%2), %%ymm8, %%ymm8\n"
      "vpaddq 288(%2), %%ymm9, %%ymm9; vpaddq 320(%2), %%ymm10, %%ymm10; vpaddq 352(%2), %%ymm11, %%ymm11\n"
      "vpaddq 384(%2), %%ymm12, %%ymm12; vpaddq 416(%2), %%ymm13, %%ymm13; vpaddq 448(%2), %%ymm14, %%ymm14\n"
      "vpaddq 480(%2), %%ymm15, %%ymm15; dec %0; jnz 1b\n"
      "vmovdqu %%ymm0, 0(%3); vmovdqu %%ymm1, 32(%3); vmovdqu %%ymm2, 64(%3); vmovdqu %%ymm3, 96(%3)\n"
      "vmovdqu %%ymm4, 128(%3); vmovdqu %%ymm5, 160(%3); vmovdqu %%ymm6, 192(%3); vmovdqu %%ymm7, 224(%3)\n"
      "vmovdqu %%ymm8, 256(%3); vmovdqu %%ymm9, 288(%3); vmovdqu %%ymm10, 320(%3); vmovdqu %%ymm11, 352(%3)\n"
      "vmovdqu %%ymm12, 384(%3); vmovdqu %%ymm13, 416(%3); vmovdqu %%ymm14, 448(%3); vmovdqu %%ymm15, 480(%3)\n"
      : "+r"(rounds)
      : "r"(start), "r"(step), "r"(result)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15");
}

// ZMM registers of the lower and the upper sixteen (a state component each) and k1 hold a value while the CPU is busy
// with something else.
__attribute__((target("avx512f"))) static uint64_t hold(uint64_t seed) {
  uint64_t rounds = ROUNDS, mask;
  __asm__ volatile(
      "vpbroadcastq %2, %%zmm16; vpaddq %%zmm16, %%zmm16, %%zmm17; vpaddq %%zmm16, %%zmm17, %%zmm18\n"
      "vpaddq %%zmm16, %%zmm18, %%zmm30; vpaddq %%zmm16, %%zmm30, %%zmm31; kmovw %k2, %%k1\n"
      "vpaddq %%zmm16, %%zmm31, %%zmm0; vpaddq %%zmm16, %%zmm0, %%zmm15\n"
      "1: dec %0; jnz 1b\n"
      "vmovdqu64 %%zmm16, 0(%3); vmovdqu64 %%zmm17, 64(%3); vmovdqu64 %%zmm18, 128(%3)\n"
      "vmovdqu64 %%zmm30, 192(%3); vmovdqu64 %%zmm31, 256(%3); kmovw %%k1, %k1\n"
      "vmovdqu64 %%zmm0, 320(%3); vmovdqu64 %%zmm15, 384(%3)\n"
      : "+r"(rounds), "=r"(mask)
      : "r"(seed), "r"(wide)
      : "memory", "cc", "xmm0", "xmm15", "xmm16", "xmm17", "xmm18", "xmm30", "xmm31", "k1");
  return mask & 0xffff;
}

static int has_avx512(void) {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & (1u << 16))) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & 0xe6) == 0xe6;
}

int main(void) {
  uint64_t start[16][4], step[16][4], seed = (uint64_t)getpid() * 0x9e3779b97f4a7c15ull;
  for (int n = 0; n < 16; n++)
    for (int lane = 0; lane < 4; lane++) {
      start[n][lane] = seed + n * 4 + lane;
      step[n][lane] = n + 1 + lane;
    }
  sums(start, step);
  for (int n = 0; n < 16; n++)
    for (int lane = 0; lane < 4; lane++)
      if (result[n][lane] != start[n][lane] + ROUNDS * step[n][lane]) {
        printf("wrong: ymm%d lane %d\n", n, lane);
        return 1;
      }
  if (has_avx512()) {
    uint64_t mask = hold(seed);
    for (int n = 0; n < 7; n++)
      for (int lane = 0; lane < 8; lane++)
        if (wide[n][lane] != seed * (n + 1)) {
          printf("wrong: zmm %d lane %d\n", n, lane);
          return 1;
        }
    if (mask != (seed & 0xffff)) {
      printf("wrong: k1\n");
      return 1;
    }
    printf("avx sums right, avx-512 too\n");
  } else {
    printf("avx sums right\n");
  }
  return 0;
}
