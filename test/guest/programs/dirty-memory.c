/*
 * Writes memory over and over: `dirty-memory MEBIBYTES`. Each pass checks what the pass before it wrote, writes its own,
 * and says `pass N`. What was not as written ends it, with a line that says where.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t word(uint64_t pass, uint64_t at) { return (pass * 0x9e3779b97f4a7c15u) ^ (at * 0xc2b2ae3d27d4eb4fu); }

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  size_t count = ((size_t)atoi(argv[1]) << 20) / sizeof(uint64_t);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE; /* page faults are slow where guest kernels are interpreted */
  uint64_t *words = mmap(NULL, count * sizeof(uint64_t), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (words == MAP_FAILED) return 3;
  for (uint64_t pass = 1;; pass++) {
    for (size_t i = 0; i < count; i++) {
      if (pass > 1 && words[i] != word(pass - 1, i)) {
        dprintf(1, "wrong: word %zu in pass %llu\n", i, (unsigned long long)pass);
        return 1;
      }
      words[i] = word(pass, i);
    }
    if (dprintf(1, "pass %llu\n", (unsigned long long)pass) < 0) return 4;
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
  }
}
