/*
 * Writes memory over and over: `dirty-memory MEBIBYTES FILE`. Each pass checks what the pass before it wrote, then writes
 * its own; then the number of the pass goes to FILE. What was not as written ends it with a line that says where.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t word(uint64_t pass, uint64_t at) { return (pass * 0x9e3779b97f4a7c15u) ^ (at * 0xc2b2ae3d27d4eb4fu); }

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  size_t count = ((size_t)atoi(argv[1]) << 20) / sizeof(uint64_t);
  uint64_t *words = mmap(NULL, count * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  int log = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (words == MAP_FAILED || log < 0) return 3;
  for (uint64_t pass = 1;; pass++) {
    for (size_t i = 0; i < count; i++) {
      if (pass > 1 && words[i] != word(pass - 1, i)) {
        dprintf(log, "\npass %llu: word %zu is wrong\n", (unsigned long long)pass, i);
        return 1;
      }
      words[i] = word(pass, i);
    }
    char line[32];
    int length = snprintf(line, sizeof line, "%llu\n", (unsigned long long)pass);
    if (pwrite(log, line, length, 0) != length) return 4;
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
  }
}
