/*
 * How fast user mode is: the same program runs in a guest and on its host, and measures itself.
 *
 *   cpu LOOP TICKS SEGMENTS
 *
 * LOOP is `compute`, a chain of multiplications, or `memory`, a chain of reads all over 16 MiB in pages of 4 KiB: prints,
 * for each of SEGMENTS spans of TICKS ticks of the TSC, how many iterations were done and in how many ticks. Or it is
 * `gaps`: looks at the TSC all the time and prints how long each interruption was, a line for each, then `of TICKS`.
 */
#define _DEFAULT_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <x86intrin.h>

#define MEMORY (16ul << 20)
#define LINE 64
#define LINES (MEMORY / LINE)
#define BLOCK 2048       /* iterations between two looks at the clock */
#define GAP 10000        /* ticks: a few us, which no instruction takes */
#define MAX_GAPS 100000

static uint64_t state = 88172645463325252;

static uint64_t compute(void) {
  for (int i = 0; i < BLOCK; i++) {
    state ^= state >> 29;
    state *= 0xbf58476d1ce4e5b9;
  }
  return state;
}

static uint64_t *at;

static uint64_t memory(void) {
  for (int i = 0; i < BLOCK / 64; i++) at = (uint64_t *)*at;
  return *at;
}

/* One cycle through all lines, in an order that is the same in every run. */
static void prepare_memory(void) {
  char *lines = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint32_t *order = malloc(LINES * sizeof *order);
  if (lines == MAP_FAILED || !order) {
    fprintf(stderr, "cpu: no memory\n");
    exit(1);
  }
  madvise(lines, MEMORY, MADV_NOHUGEPAGE); /* fails where there are none */
  for (uint32_t i = 0; i < LINES; i++) order[i] = i;
  for (uint32_t i = LINES - 1; i > 0; i--) {
    uint32_t other = compute() % (i + 1), line = order[i];
    order[i] = order[other];
    order[other] = line;
  }
  for (uint32_t i = 0; i < LINES; i++) {
    *(char **)(lines + (uint64_t)order[i] * LINE) = lines + (uint64_t)order[(i + 1) % LINES] * LINE;
  }
  free(order);
  at = (uint64_t *)lines;
}

static void gaps(uint64_t ticks) {
  static uint64_t found[MAX_GAPS];
  int count = 0;
  uint64_t start = __rdtsc(), before = start, now;
  for (; (now = __rdtsc()) - start < ticks; before = now) {
    if (now - before > GAP && count < MAX_GAPS) found[count++] = now - before;
  }
  for (int i = 0; i < count; i++) printf("%lu\n", found[i]);
  printf("of %lu\n", now - start);
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: cpu compute|memory|gaps TICKS SEGMENTS\n");
    return 64;
  }
  uint64_t ticks = strtoull(argv[2], NULL, 10);
  if (!strcmp(argv[1], "gaps")) {
    gaps(ticks);
    return 0;
  }
  int is_memory = !strcmp(argv[1], "memory");
  if (is_memory) prepare_memory();
  uint64_t (*block)(void) = is_memory ? memory : compute;
  uint64_t each = is_memory ? BLOCK / 64 : BLOCK;
  int segments = atoi(argv[3]);
  uint64_t *iterations = calloc(segments, sizeof *iterations), *spans = calloc(segments, sizeof *spans);
  volatile uint64_t sink;
  for (int i = 0; i < segments; i++) {
    uint64_t start = __rdtsc(), now;
    do {
      sink = block();
      iterations[i] += each;
    } while ((now = __rdtsc()) - start < ticks);
    spans[i] = now - start;
  }
  (void)sink;
  for (int i = 0; i < segments; i++) printf("%lu %lu\n", iterations[i], spans[i]);
  return 0;
}
