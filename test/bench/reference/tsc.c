/* Prints how many ticks of the TSC a second has, which is what a guest sees as long as KVM does not scale it. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

#define NANOSECONDS 200000000

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(void) {
  double start = now(), end;
  unsigned long long first = __rdtsc(), last;
  do {
    end = now();
    last = __rdtsc();
  } while (end - start < NANOSECONDS);
  printf("%.0f\n", (last - first) / (end - start) * 1e9);
  return 0;
}
