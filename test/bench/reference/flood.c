/*
 * Keeps an interface's transmit queue filled, so that whoever reads the tap behind it always finds frames.
 *
 *   flood INTERFACE SIZE
 *
 * Sends frames of SIZE bytes without their checksum, to everybody and of the EtherType for experiments, until it is
 * ended or the process that started it is. It sends no more than the queue holds, as /proc/net/dev tells: frames that
 * are only dropped would take the processor from the one that is measured.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define FULL 3072 /* below the txqueuelen that the bench gives the tap */
#define PAUSE_NS 20000
#define LOST_PAUSES 1000 /* after so many without progress, what was sent is not in the queue any more */

static void fail(const char *what) {
  fprintf(stderr, "flood: %s: %s\n", what, strerror(errno));
  exit(1);
}

/* Frames that were read from the tap. */
static unsigned long taken(int proc, const char *interface) {
  char text[4096];
  ssize_t length = pread(proc, text, sizeof text - 1, 0);
  if (length < 0) fail("/proc/net/dev");
  text[length] = 0;
  const char *line = strstr(text, interface);
  unsigned long packets;
  if (!line || sscanf(line, "%*[^:]: %*u %*u %*u %*u %*u %*u %*u %*u %*u %lu", &packets) != 1) fail(interface);
  return packets;
}

int main(int argc, char **argv) {
  int size = argc == 3 ? atoi(argv[2]) : 0;
  if (size < ETH_ZLEN || size > ETH_FRAME_LEN) {
    fprintf(stderr, "usage: flood INTERFACE SIZE\n");
    return 64;
  }
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  prctl(PR_SET_TIMERSLACK, 1);

  int proc = open("/proc/self/net/dev", O_RDONLY | O_CLOEXEC);
  if (proc < 0) fail("/proc/self/net/dev");
  int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
  if (fd < 0) fail("socket");
  int on = 1;
  if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on)) fail("PACKET_QDISC_BYPASS");
  struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(argv[1])};
  if (to.sll_ifindex == 0 || bind(fd, (struct sockaddr *)&to, sizeof to)) fail(argv[1]);

  char frame[ETH_FRAME_LEN] = {0};
  memset(frame, 0xff, ETH_ALEN);
  frame[ETH_ALEN] = 2; /* a local address */
  *(unsigned short *)(frame + 2 * ETH_ALEN) = htons(ETH_P_802_EX1);
  struct iovec iovec = {frame, size};
  struct mmsghdr messages[BATCH];
  memset(messages, 0, sizeof messages);
  for (int i = 0; i < BATCH; i++) {
    messages[i].msg_hdr.msg_iov = &iovec;
    messages[i].msg_hdr.msg_iovlen = 1;
  }

  unsigned long sent = taken(proc, argv[1]), before = 0;
  for (int pauses = 0;;) {
    unsigned long now = taken(proc, argv[1]);
    if (now != before) pauses = 0;
    before = now;
    if (sent + BATCH <= now + FULL) {
      int count = sendmmsg(fd, messages, BATCH, 0);
      if (count > 0) {
        sent += count;
        continue;
      }
      /* Nobody has opened the tap, or the queue is full after all: a frame that is dropped is not counted as sent. */
      if (errno != ENOBUFS && errno != ENETDOWN && errno != EAGAIN) fail("sendmmsg");
    }
    if (++pauses == LOST_PAUSES) sent = now;
    nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
  }
}
