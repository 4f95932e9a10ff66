/*
 * The C reference of the benches: the least VMM that makes the machine tsvisor makes, with the same KVM calls in the same
 * order and the same structures in guest memory, and handles its exits inline. It is what a ratio "to C" compares with.
 *
 *   vmm ELF [ROUNDS [threaded]]
 *
 * Runs the guest ROUNDS times (default 1) in this process, one after the other, and prints a line for each: the
 * milestones that the guest stamped, in the order of their numbers, in milliseconds since making the machine began.
 * Exits with the guest's code on port 0xf4, or 125 when something failed.
 *
 * `threaded`: the vCPU has a thread of its own, which hands its exits to the first one and waits until they are handled.
 * Both sides spin for a moment before they sleep.
 *
 * What differs from tsvisor, in the reference's favour: it asks for no registers at an exit (KVM_CAP_SYNC_REGS), has no
 * thread but these, and takes no control messages.
 * In tsvisor's: for a machine that follows another one in its process, or that a thread was kept ready for, it makes these
 * calls up to KVM_SET_CPUID2 before anybody asks for the machine.
 */
#define _GNU_SOURCE
#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (64ul << 20)
#define GDT 0x500
#define IDT 0x520
#define BOOT_PARAMS 0x7000
#define PAGE_TABLES 0x9000
#define COMMAND_LINE 0x20000
#define MP_TABLE 0x9fc00
#define IDENTITY_MAP 0xfffbc000ul
#define TSS 0xfffbd000ul

#define EXIT_PORT 0xf4
#define TIMER_PORT 0xf8
#define SERIAL_PORT 0x3f8
#define SERIAL_SCRATCH 7

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void fail(const char *what) {
  fprintf(stderr, "vmm: %s: %s\n", what, strerror(errno));
  exit(125);
}

static int kvm_ioctl(int fd, unsigned long request, const char *name, unsigned long argument) {
  int result = ioctl(fd, request, argument);
  if (result < 0) fail(name);
  return result;
}
#define KVM(fd, request, argument) kvm_ioctl(fd, request, #request, (unsigned long)(argument))

struct machine {
  int kvm, vm, vcpu;
  size_t run_size;
  uint8_t *memory;
  struct kvm_run *run;
  uint8_t scratch;
  double stamps[256];
};

/* The same answer as tsvisor's detectKvmFlavour: whether guest kernel mode is interpreted. */
static int interpreted(void) {
  if (!access("/sys/module/kvm_intel", F_OK) || !access("/sys/module/kvm_amd", F_OK)) return 0;
  return !access("/sys/module/kvm_pvm", F_OK);
}

static uint64_t load_elf(uint8_t *memory, const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (fd < 0 || fstat(fd, &status)) fail(path);
  uint8_t *file = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (file == MAP_FAILED) fail(path);
  Elf64_Ehdr *header = (Elf64_Ehdr *)file;
  Elf64_Phdr *segment = (Elf64_Phdr *)(file + header->e_phoff);
  uint64_t entry = header->e_entry;
  for (int i = 0; i < header->e_phnum; i++) {
    if (segment[i].p_type != PT_LOAD) continue;
    if (segment[i].p_paddr + segment[i].p_memsz > MEMORY) fail("segment outside memory");
    memcpy(memory + segment[i].p_paddr, file + segment[i].p_offset, segment[i].p_filesz);
  }
  munmap(file, status.st_size);
  close(fd);
  return entry;
}

static void write_boot_structures(uint8_t *memory) {
  static const char command_line[] = "reboot=k panic=-1";
  memcpy(memory + COMMAND_LINE, command_line, sizeof command_line);
  struct boot_params *params = (void *)(memory + BOOT_PARAMS);
  params->hdr.boot_flag = 0xaa55;
  params->hdr.header = 0x53726448;
  params->hdr.version = 0x20f;
  params->hdr.type_of_loader = 0xff;
  params->hdr.cmd_line_ptr = COMMAND_LINE;
  params->hdr.cmdline_size = 2047;
  params->e820_entries = 3;
  params->e820_table[0] = (struct boot_e820_entry){0, MP_TABLE, 1};
  params->e820_table[1] = (struct boot_e820_entry){MP_TABLE, 0x400, 2};
  params->e820_table[2] = (struct boot_e820_entry){0x100000, MEMORY - 0x100000, 1};

  uint64_t *tables = (uint64_t *)(memory + PAGE_TABLES); /* PML4, PDPT, four directories */
  tables[0] = (PAGE_TABLES + 0x1000) | 0x23;
  for (int i = 0; i < 4; i++) tables[512 + i] = (PAGE_TABLES + 0x2000 + i * 0x1000) | 0x23;
  for (uint64_t i = 0; i < 4 * 512; i++) tables[1024 + i] = (i << 21) | 0xe3;

  uint64_t *gdt = (uint64_t *)(memory + GDT);
  gdt[2] = 0x00af9b000000ffff;
  gdt[3] = 0x00cf93000000ffff;
  memset(memory + MP_TABLE, 0, 0x400); /* its content is not looked at by these guests */
}

static void set_entry_state(int vcpu, uint64_t entry) {
  struct kvm_sregs sregs;
  KVM(vcpu, KVM_GET_SREGS, &sregs);
  struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
  struct kvm_segment code = {.limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .l = 1, .s = 1, .g = 1};
  sregs.cs = code;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.tr = (struct kvm_segment){.limit = 0x67, .type = 11, .present = 1};
  sregs.gdt = (struct kvm_dtable){.base = GDT, .limit = 31};
  sregs.idt = (struct kvm_dtable){.base = IDT, .limit = 0};
  sregs.cr0 = 0x80010031;
  sregs.cr3 = PAGE_TABLES;
  sregs.cr4 = 0x20;
  sregs.efer = 0x500;
  KVM(vcpu, KVM_SET_SREGS, &sregs);
  struct kvm_regs regs = {.rip = entry, .rflags = 2, .rsi = BOOT_PARAMS};
  KVM(vcpu, KVM_SET_REGS, &regs);
}

static void set_cpuid(struct machine *m) {
  struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[256];
  } cpuid = {.head.nent = 256};
  KVM(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
  for (uint32_t i = 0; i < cpuid.head.nent; i++) {
    struct kvm_cpuid_entry2 *e = &cpuid.entries[i];
    if (e->function == 1) {
      e->ebx = (e->ebx & 0xffff) | 1 << 16;
      e->ecx |= 1u << 31 | 1 << 24;
    }
  }
  KVM(m->vcpu, KVM_SET_CPUID2, &cpuid);
}

/* What a VMM needs to complete SYSCALL where KVM interprets the guest's kernel: exits on writes of its MSRs. */
static void prepare_assist(struct machine *m) {
  struct kvm_enable_cap capability = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {KVM_MSR_EXIT_REASON_FILTER}};
  KVM(m->vm, KVM_ENABLE_CAP, &capability);
  uint8_t bitmap[8];
  memset(bitmap, 0xff, sizeof bitmap);
  bitmap[0] = 0xf4; /* STAR, LSTAR, FMASK */
  struct kvm_msr_filter filter = {.flags = KVM_MSR_FILTER_DEFAULT_ALLOW};
  filter.ranges[0] = (struct kvm_msr_filter_range){
      .flags = KVM_MSR_FILTER_WRITE, .nmsrs = 64, .base = 0xc0000081, .bitmap = bitmap};
  KVM(m->vm, KVM_X86_SET_MSR_FILTER, &filter);
}

static void read_syscall_msrs(struct machine *m) {
  struct {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[3];
  } msrs = {.head.nmsrs = 3, .entries = {{.index = 0xc0000081}, {.index = 0xc0000082}, {.index = 0xc0000084}}};
  KVM(m->vcpu, KVM_GET_MSRS, &msrs);
}

static void create(struct machine *m, const char *elf) {
  m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (m->kvm < 0) fail("/dev/kvm");
  KVM(m->kvm, KVM_GET_API_VERSION, 0);
  m->run_size = KVM(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  m->vm = KVM(m->kvm, KVM_CREATE_VM, 0);
  if (interpreted()) prepare_assist(m); /* before the irqchip: with one the filter waits 8 ms for a grace period */
  KVM(m->vm, KVM_SET_TSS_ADDR, TSS);
  uint64_t identity = IDENTITY_MAP;
  KVM(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity);
  m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m->memory == MAP_FAILED) fail("guest memory");
  madvise(m->memory, MEMORY, MADV_HUGEPAGE);
  struct kvm_userspace_memory_region region = {.memory_size = MEMORY, .userspace_addr = (uint64_t)m->memory};
  KVM(m->vm, KVM_SET_USER_MEMORY_REGION, &region);
  KVM(m->vm, KVM_CREATE_IRQCHIP, 0);
  m->vcpu = KVM(m->vm, KVM_CREATE_VCPU, 0);
  m->run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
  if (m->run == MAP_FAILED) fail("kvm_run");
  set_cpuid(m);
  uint64_t entry = load_elf(m->memory, elf);
  write_boot_structures(m->memory);
  set_entry_state(m->vcpu, entry);
  if (interpreted()) read_syscall_msrs(m);
}

static void destroy(struct machine *m) {
  munmap(m->run, m->run_size);
  close(m->vcpu);
  close(m->vm);
  close(m->kvm);
  munmap(m->memory, MEMORY);
}

/* Returns the guest's exit code, or -1 while it has not ended. */
static int port_write(struct machine *m, uint16_t port, uint8_t value) {
  switch (port) {
    case SERIAL_PORT + SERIAL_SCRATCH:
      m->scratch = value;
      break;
    case TIMER_PORT:
      if (m->stamps[value] == 0) m->stamps[value] = now();
      break;
    case EXIT_PORT:
      return value;
    case SERIAL_PORT:
      putchar(value);
      fflush(stdout);
      break;
  }
  return -1;
}

static uint8_t port_read(struct machine *m, uint16_t port) {
  return port == SERIAL_PORT + SERIAL_SCRATCH ? m->scratch : 0xff;
}

static int handle_port(struct machine *m) {
  struct kvm_run *run = m->run;
  uint8_t *data = (uint8_t *)run + run->io.data_offset;
  for (uint32_t i = 0; i < run->io.count * run->io.size; i++) {
    uint16_t port = run->io.port + i % run->io.size;
    if (run->io.direction == KVM_EXIT_IO_IN) {
      data[i] = port_read(m, port);
    } else {
      int code = port_write(m, port, data[i]);
      if (code >= 0) return code;
    }
  }
  return -1;
}

/* No device decodes MMIO here: writes are dropped, reads give all ones. */
static void handle_mmio(struct kvm_run *run) {
  if (!run->mmio.is_write) memset(run->mmio.data, 0xff, sizeof run->mmio.data);
}

/* Returns the guest's exit code, or -1 while it has not ended. */
static int handle_exit(struct machine *m) {
  switch (m->run->exit_reason) {
    case KVM_EXIT_IO:
      return handle_port(m);
    case KVM_EXIT_MMIO:
      handle_mmio(m->run);
      return -1;
    default:
      fprintf(stderr, "vmm: exit %u, which this reference does not handle\n", m->run->exit_reason);
      exit(125);
  }
}

static void enter_guest(struct machine *m) {
  while (ioctl(m->vcpu, KVM_RUN, 0) < 0) {
    if (errno != EINTR && errno != EAGAIN) fail("KVM_RUN");
  }
}

static int run_guest(struct machine *m) {
  for (;;) {
    enter_guest(m);
    int code = handle_exit(m);
    if (code >= 0) return code;
  }
}

/* ---- The same with two threads, one of which always waits for the other ---- */

#define SPINS 2000

enum turn { VCPU, HANDLER, OVER };
static _Atomic uint32_t turn;
static _Atomic int asleep[2];

static void hand_over(enum turn from, enum turn to) {
  atomic_store(&turn, to);
  if (atomic_load(&asleep[!from])) syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Waits until the turn is not the other one's. Returns what it is. */
static enum turn wait_for(enum turn self) {
  uint32_t now, other = !self;
  for (int i = 0; i < SPINS; i++) {
    if ((now = atomic_load(&turn)) != other) return now;
    __builtin_ia32_pause();
  }
  atomic_store(&asleep[self], 1);
  while ((now = atomic_load(&turn)) == other) syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, other, NULL, NULL, 0);
  atomic_store(&asleep[self], 0);
  return now;
}

static void *vcpu_thread(void *machine) {
  while (wait_for(VCPU) != OVER) {
    enter_guest(machine);
    hand_over(VCPU, HANDLER);
  }
  return NULL;
}

static int run_threaded(struct machine *m) {
  pthread_t thread;
  turn = VCPU;
  if ((errno = pthread_create(&thread, NULL, vcpu_thread, m))) fail("pthread_create");
  for (;;) {
    wait_for(HANDLER);
    int code = handle_exit(m);
    hand_over(HANDLER, code < 0 ? VCPU : OVER);
    if (code < 0) continue;
    pthread_join(thread, NULL);
    return code;
  }
}

int main(int argc, char **argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: vmm ELF [ROUNDS [threaded]]\n");
    return 125;
  }
  int code = 0;
  int threaded = argc > 3 && !strcmp(argv[3], "threaded");
  for (int rounds = argc > 2 ? atoi(argv[2]) : 1; rounds > 0; rounds--) {
    struct machine machine = {0};
    double start = now();
    create(&machine, argv[1]);
    code = threaded ? run_threaded(&machine) : run_guest(&machine);
    destroy(&machine);
    for (int i = 0; i < 256; i++) {
      if (machine.stamps[i] != 0) printf("%.6f ", machine.stamps[i] - start);
    }
    putchar('\n');
  }
  return code;
}
