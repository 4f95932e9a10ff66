/*
 * Drives one virtio-mmio device as fast as it can, and prints how far it came over the serial port.
 *
 * It is a driver without an operating system, so that what is timed is the device: it runs in user mode (user-mode.S),
 * keeps interrupts off, polls the used rings and reads the TSC. It negotiates what a Linux driver does as far as that
 * concerns the rings: VERSION_1 and EVENT_IDX where offered, so that notifications are suppressed while the device
 * works anyway. It uses no indirect descriptors, whose table would be one more read of each request for every VMM.
 *
 * All that is free is published at once, and the device notified once for it if it asks for that: as Linux does for
 * requests and frames that come in batches.
 *
 * Command line:
 *   virtio_mmio.device=SIZE@ADDRESS:IRQ   where a device may be, one word each
 *   bench=NAME                            one of the table below
 *   depth=N size=N                        requests in flight, bytes of each
 *   warmup=N segment=N segments=N         TSC ticks before the first segment and of each, and how many
 *
 * Prints `segment OPERATIONS TICKS` for each, then `total OPERATIONS` with those of the warm-up, and exits with code 0 on
 * port 0xf4; or prints `error: TEXT` and exits with code 1.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define NULL ((void *)0)
#define SERIAL 0x3f8
#define SERIAL_STATUS (SERIAL + 5)
#define TRANSMITTER_EMPTY 0x20
#define EXIT 0xf4

static void out(u16 port, u8 value) {
  __asm__ volatile("out %0, %1" : : "a"(value), "Nd"(port));
}

static u8 in(u16 port) {
  u8 value;
  __asm__ volatile("in %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}

static u64 tsc(void) {
  u32 low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
  return (u64)high << 32 | low;
}

static void print(const char *text) {
  for (; *text; text++) {
    while (!(in(SERIAL_STATUS) & TRANSMITTER_EMPTY)) continue;
    out(SERIAL, *text);
  }
}

static void print_number(u64 value) {
  char digits[21];
  char *at = digits + sizeof digits;
  *--at = 0;
  do *--at = '0' + value % 10;
  while (value /= 10);
  print(at);
}

static _Noreturn void end(u8 code) {
  out(EXIT, code);
  for (;;) continue;
}

static _Noreturn void fail(const char *text) {
  print("error: ");
  print(text);
  print("\n");
  end(1);
}

/* ---- Command line ---- */

static const char *command_line;

/* What comes after `prefix` in the first word from `from` on that starts with it; NULL if there is none. */
static const char *find_word(const char *from, const char *prefix) {
  for (const char *word = from; *word;) {
    while (*word == ' ') word++;
    const char *a = word, *b = prefix;
    while (*b && *a == *b) a++, b++;
    if (!*b) return a;
    while (*word && *word != ' ') word++;
  }
  return NULL;
}

static u64 number(const char *text) {
  u64 value = 0, base = 10;
  if (text[0] == '0' && text[1] == 'x') base = 16, text += 2;
  for (;; text++) {
    u64 digit = *text >= '0' && *text <= '9' ? *text - '0' : *text >= 'a' && *text <= 'f' ? *text - 'a' + 10 : 99;
    if (digit >= base) return value;
    value = value * base + digit;
  }
}

static u64 argument(const char *prefix) {
  const char *text = find_word(command_line, prefix);
  if (!text) fail(prefix);
  return number(text);
}

static int is_word(const char *word, const char *text) {
  while (*text && *word == *text) word++, text++;
  return !*text && (!*word || *word == ' ');
}

/* ---- virtio-mmio (virtio 1.2, section 4.2) ---- */

enum {
  MAGIC = 0x00, VERSION = 0x04, DEVICE_ID = 0x08, DEVICE_FEATURES = 0x10, DEVICE_FEATURES_SEL = 0x14,
  DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24, QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38,
  QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70, QUEUE_DESC = 0x80, QUEUE_DRIVER = 0x90, QUEUE_DEVICE = 0xa0,
  CONFIG = 0x100,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { NET = 1, BLOCK = 2, CONSOLE = 3 };
#define EVENT_IDX (1u << 29)
#define VERSION_1 (1u << 0) /* in the upper word */

static volatile u8 *registers;
static int event_idx;

static u32 get(u32 offset) {
  return *(volatile u32 *)(registers + offset);
}

static void set(u32 offset, u32 value) {
  *(volatile u32 *)(registers + offset) = value;
}

static int find_device(u32 id) {
  const char *word = command_line;
  while ((word = find_word(word, "virtio_mmio.device="))) {
    while (*word != '@' && *word && *word != ' ') word++;
    if (*word != '@') return 0;
    registers = (u8 *)number(word + 1);
    if (get(MAGIC) == 0x74726976 && get(VERSION) == 2 && get(DEVICE_ID) == id) return 1;
  }
  return 0;
}

/* Up to FEATURES_OK: the device's own `wanted` features it must have. */
static void open_device(u32 id, u32 wanted) {
  if (!find_device(id)) fail("there is no such device");
  set(STATUS, 0);
  while (get(STATUS)) continue;
  set(STATUS, ACKNOWLEDGE | DRIVER);
  set(DEVICE_FEATURES_SEL, 1);
  if (!(get(DEVICE_FEATURES) & VERSION_1)) fail("the device is a legacy one");
  set(DEVICE_FEATURES_SEL, 0);
  u32 offered = get(DEVICE_FEATURES);
  if ((offered & wanted) != wanted) fail("the device lacks a feature");
  event_idx = !!(offered & EVENT_IDX);
  set(DRIVER_FEATURES_SEL, 0);
  set(DRIVER_FEATURES, wanted | (offered & EVENT_IDX));
  set(DRIVER_FEATURES_SEL, 1);
  set(DRIVER_FEATURES, VERSION_1);
  set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
  if (!(get(STATUS) & FEATURES_OK)) fail("the device refuses the features");
}

static void start_device(void) {
  set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/* ---- Virtqueues (section 2.7) ---- */

#define MAX_QUEUE 256
enum { NEXT = 1, DEVICE_WRITES = 2 };
enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };

struct descriptor {
  u64 address;
  u32 length;
  u16 flags, next;
};

struct queue {
  struct descriptor descriptors[MAX_QUEUE] __attribute__((aligned(4096)));
  struct {
    volatile u16 flags, index, ring[MAX_QUEUE + 1]; /* used_event comes after the last one */
  } avail __attribute__((aligned(4096)));
  struct {
    volatile u16 flags, index;
    volatile struct {
      u32 id, length;
    } ring[MAX_QUEUE + 1]; /* avail_event comes after the last one */
  } used __attribute__((aligned(4096)));
  u16 number, size;
  u16 added;     /* chains put into the avail ring */
  u16 published; /* of these, the device may see so many */
  u16 seen;      /* used elements taken */
};

static struct queue queues[2];

static volatile u16 *used_event(struct queue *queue) {
  return &queue->avail.ring[queue->size];
}

static volatile u16 *avail_event(struct queue *queue) {
  return (volatile u16 *)&queue->used.ring[queue->size];
}

static struct queue *open_queue(u16 number) {
  struct queue *queue = &queues[number];
  set(QUEUE_SEL, number);
  u32 max = get(QUEUE_NUM_MAX);
  if (max == 0) fail("the device lacks a queue");
  queue->number = number;
  queue->size = max < MAX_QUEUE ? max : MAX_QUEUE;
  queue->avail.flags = AVAIL_NO_INTERRUPT;
  if (event_idx) *used_event(queue) = 0xffff;
  set(QUEUE_NUM, queue->size);
  set(QUEUE_DESC, (u32)(u64)queue->descriptors);
  set(QUEUE_DESC + 4, 0);
  set(QUEUE_DRIVER, (u32)(u64)&queue->avail);
  set(QUEUE_DRIVER + 4, 0);
  set(QUEUE_DEVICE, (u32)(u64)&queue->used);
  set(QUEUE_DEVICE + 4, 0);
  set(QUEUE_READY, 1);
  return queue;
}

static void describe(struct queue *queue, u16 at, const volatile void *address, u32 length, u16 flags) {
  queue->descriptors[at] = (struct descriptor){(u64)address, length, flags, flags & NEXT ? at + 1 : 0};
}

static void add(struct queue *queue, u16 head) {
  queue->avail.ring[queue->added++ & (queue->size - 1)] = head;
}

/* Lets the device see what was added, and notifies it if it wants that. */
static void publish(struct queue *queue) {
  u16 before = queue->published, now = queue->added;
  if (before == now) return;
  __atomic_thread_fence(__ATOMIC_RELEASE);
  queue->avail.index = now;
  queue->published = now;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  int wanted = event_idx ? (u16)(now - *avail_event(queue) - 1) < (u16)(now - before)
                         : !(queue->used.flags & USED_NO_NOTIFY);
  if (wanted) set(QUEUE_NOTIFY, queue->number);
}

/* The head of the next chain that the device has used, -1 when there is none; *length is what it has written. */
static int take(struct queue *queue, u32 *length) {
  if (queue->seen == queue->used.index) return -1;
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  u16 at = queue->seen++ & (queue->size - 1);
  *length = queue->used.ring[at].length;
  return queue->used.ring[at].id;
}

/* Keeps the point at which an interrupt is asked for just behind the device, which then never reaches it. */
static void want_no_interrupt(struct queue *queue) {
  if (event_idx) *used_event(queue) = queue->seen - 1;
}

static u8 data[1 << 20] __attribute__((aligned(4096)));
static u32 depth, size;

/* ---- Block device (section 5.2) ---- */

#define SECTOR 512
#define BLOCK_SIZE 4096
#define MAX_DEPTH (MAX_QUEUE / 3)
#define BLK_F_FLUSH (1u << 9)
enum { BLK_READ = 0, BLK_WRITE = 1, BLK_FLUSH = 4 };

static struct request {
  u32 type, reserved;
  u64 sector;
  u8 status;
} requests[MAX_DEPTH];

static u64 blocks, next_block;
static int is_random, flushes;
static u32 blk_type;

static u64 random(void) {
  static u64 state = 88172645463325252;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

static u64 *block_in(u32 slot, u32 i) {
  return (u64 *)(data + slot * size + i * BLOCK_SIZE);
}

/* The image's blocks begin with their own number, which a read checks and a write leaves as it was. */
static void request(u32 slot, u32 type) {
  struct request *request = &requests[slot];
  u16 head = slot * 3;
  request->type = type;
  request->status = 0xff;
  if (type == BLK_FLUSH) {
    request->sector = 0;
    queues[0].descriptors[head].next = head + 2;
  } else {
    u64 count = size / BLOCK_SIZE;
    u64 block = is_random ? random() % (blocks / count) * count : next_block;
    next_block = block + 2 * count > blocks ? 0 : block + count;
    request->sector = block * (BLOCK_SIZE / SECTOR);
    for (u32 i = 0; i < count && type == BLK_WRITE; i++) *block_in(slot, i) = block + i;
    queues[0].descriptors[head].next = head + 1;
  }
  add(&queues[0], head);
}

static u64 blk_step(void) {
  struct queue *queue = &queues[0];
  u64 done = 0;
  u32 length;
  int head;
  while ((head = take(queue, &length)) >= 0) {
    u32 slot = head / 3;
    if (requests[slot].status != 0) fail("a request failed");
    u32 type = requests[slot].type;
    if (type == BLK_READ && *block_in(slot, 0) != requests[slot].sector / (BLOCK_SIZE / SECTOR)) {
      fail("a read brought another block");
    }
    if (flushes && type == BLK_WRITE) {
      request(slot, BLK_FLUSH);
      continue;
    }
    done++;
    request(slot, blk_type);
  }
  want_no_interrupt(queue);
  publish(queue);
  return done;
}

static void blk_start(u32 type) {
  blk_type = type;
  open_device(BLOCK, BLK_F_FLUSH);
  struct queue *queue = open_queue(0);
  start_device();
  blocks = ((u64)get(CONFIG + 4) << 32 | get(CONFIG)) / (BLOCK_SIZE / SECTOR);
  if (depth * 3 > queue->size) fail("the queue is too short");
  for (u32 slot = 0; slot < depth; slot++) {
    describe(queue, slot * 3, &requests[slot], 16, NEXT);
    describe(queue, slot * 3 + 1, data + slot * size, size, type == BLK_READ ? NEXT | DEVICE_WRITES : NEXT);
    describe(queue, slot * 3 + 2, &requests[slot].status, 1, DEVICE_WRITES);
    request(slot, type);
  }
}

static void blk_random_read(void) {
  is_random = 1;
  blk_start(BLK_READ);
}

static void blk_read(void) {
  blk_start(BLK_READ);
}

static void blk_write(void) {
  blk_start(BLK_WRITE);
}

static void blk_write_flush(void) {
  is_random = flushes = 1;
  blk_start(BLK_WRITE);
}

/* ---- Network device (section 5.1) ---- */

#define NET_HEADER 12
#define NET_BUFFER 2048
#define ETHERNET_HEADER 14

/* To everybody, from a local address, of the EtherType for experiments. */
static const u8 ethernet[ETHERNET_HEADER] = {255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 0x88, 0xb5};

static void net_buffers(struct queue *queue, u32 length, u16 flags) {
  for (u16 i = 0; i < queue->size; i++) {
    u8 *buffer = data + i * NET_BUFFER;
    describe(queue, i, buffer, length, flags);
    for (u32 j = 0; j < ETHERNET_HEADER; j++) buffer[NET_HEADER + j] = ethernet[j];
    add(queue, i);
  }
}

static void net_send(void) {
  open_device(NET, 0);
  open_queue(0);
  struct queue *queue = open_queue(1);
  start_device();
  net_buffers(queue, NET_HEADER + size, 0);
}

static void net_receive(void) {
  open_device(NET, 0);
  struct queue *queue = open_queue(0);
  open_queue(1);
  start_device();
  net_buffers(queue, NET_BUFFER, DEVICE_WRITES);
}

static u64 net_receive_step(void) {
  struct queue *queue = &queues[0];
  u64 done = 0;
  u32 length;
  int head;
  while ((head = take(queue, &length)) >= 0) {
    const u8 *type = data + head * NET_BUFFER + NET_HEADER + ETHERNET_HEADER - 2;
    if (type[0] == ethernet[12] && type[1] == ethernet[13]) {
      if (length != NET_HEADER + size) fail("a frame came with another length");
      done++;
    }
    add(queue, head);
  }
  want_no_interrupt(queue);
  publish(queue);
  return done;
}

/* ---- Console device (section 5.3) ---- */

static void console_write(void) {
  open_device(CONSOLE, 0);
  open_queue(0);
  struct queue *queue = open_queue(1);
  start_device();
  if (depth > queue->size) fail("the queue is too short");
  for (u32 i = 0; i < depth * size; i++) data[i] = i % 64 == 63 ? '\n' : 'a' + i % 26;
  for (u16 i = 0; i < depth; i++) {
    describe(queue, i, data + i * size, size, 0);
    add(queue, i);
  }
}

/* Sends the same buffers again and again, by the second queue as net and console have it. */
static u64 send_step(void) {
  struct queue *queue = &queues[1];
  u64 done = 0;
  u32 length;
  int head;
  while ((head = take(queue, &length)) >= 0) {
    add(queue, head);
    done++;
  }
  want_no_interrupt(queue);
  publish(queue);
  return done;
}

/* ---- Measuring ---- */

static const struct bench {
  const char *name;
  void (*start)(void);
  u64 (*step)(void); /* @returns how many operations were completed; never waits */
} benches[] = {
    {"blk-random-read", blk_random_read, blk_step}, {"blk-read", blk_read, blk_step},
    {"blk-write", blk_write, blk_step},             {"blk-write-flush", blk_write_flush, blk_step},
    {"net-send", net_send, send_step},              {"net-receive", net_receive, net_receive_step},
    {"console-write", console_write, send_step},
};

#define MAX_SEGMENTS 64
static u64 operations[MAX_SEGMENTS], ticks[MAX_SEGMENTS];

/* @returns when it ended: at the first chance after `until`. */
static u64 run(u64 (*step)(void), u64 until, u64 *done) {
  u64 now;
  do {
    u64 count = step();
    *done += count;
    if (!count) __builtin_ia32_pause();
    now = tsc();
  } while (now < until);
  return now;
}

static void measure(const struct bench *bench) {
  u64 warmup = argument("warmup="), segment = argument("segment="), segments = argument("segments=");
  if (segments > MAX_SEGMENTS) fail("too many segments");
  bench->start();
  publish(&queues[0]);
  publish(&queues[1]);
  u64 total = 0;
  u64 now = run(bench->step, tsc() + warmup, &total);
  for (u64 i = 0; i < segments; i++) {
    u64 start = now;
    now = run(bench->step, start + segment, &operations[i]);
    ticks[i] = now - start;
  }
  for (u64 i = 0; i < segments; i++) {
    print("segment ");
    print_number(operations[i]);
    print(" ");
    print_number(ticks[i]);
    print("\n");
    total += operations[i];
  }
  print("total ");
  print_number(total);
  print("\n");
}

_Noreturn void user_main(const u8 *hvm_start_info) {
  command_line = *(const char *const *)(hvm_start_info + 24);
  depth = argument("depth=");
  size = argument("size=");
  if (depth > MAX_DEPTH || depth * size > sizeof data) fail("too much at once");
  const char *name = find_word(command_line, "bench=");
  for (u32 i = 0; name && i < sizeof benches / sizeof *benches; i++) {
    if (!is_word(name, benches[i].name)) continue;
    measure(&benches[i]);
    end(0);
  }
  fail("there is no such bench");
}
