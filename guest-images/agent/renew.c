/* RENEW: what a guest that was restored from a snapshot may not share with others that were. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include <linux/random.h>

#include "operations.h"
#include "text.h"

enum { MAC_SIZE = 6 };

/* What failed first, and with which errno. */
static char subject[64];
static int failure;

static void note_failure(const char *what)
{
	if (failure)
		return;
	failure = errno;
	append(subject, sizeof subject, what);
}

/* An image may have no /dev. */
static int open_random(void)
{
	static const char node[] = "/.tsvisor-random";
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);

	if (fd >= 0 || errno != ENOENT || mknod(node, S_IFCHR | 0600, makedev(1, 9)) < 0)
		return fd;
	fd = open(node, O_RDONLY | O_CLOEXEC);
	unlink(node);
	return fd;
}

static void renew_random(const unsigned char *seed)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[SEED_SIZE];
	} entropy = { .info = { .entropy_count = 8 * SEED_SIZE, .buf_size = SEED_SIZE } };
	int fd = open_random();

	memcpy(entropy.bytes, seed, SEED_SIZE);
	if (fd < 0 || ioctl(fd, RNDADDENTROPY, &entropy) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
		note_failure("/dev/urandom");
	if (fd >= 0)
		close(fd);
	explicit_bzero(&entropy, sizeof entropy);
}

static void renew_mac(uint32_t interface, const unsigned char *mac)
{
	struct ifreq request = { .ifr_hwaddr.sa_family = ARPHRD_ETHER };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	append(request.ifr_name, sizeof request.ifr_name, "eth");
	append_number(request.ifr_name, sizeof request.ifr_name, interface);
	memcpy(request.ifr_hwaddr.sa_data, mac, MAC_SIZE);
	if (fd < 0 || ioctl(fd, SIOCSIFHWADDR, &request) < 0)
		note_failure(request.ifr_name);
	if (fd >= 0)
		close(fd);
}

void operate_renew(const struct frame *request)
{
	struct reader from = read_frame(request), macs;
	uint32_t flags = get_u32(&from), count;
	unsigned char seed[SEED_SIZE], mac[MAC_SIZE];
	struct timespec now = { 0 };
	const char *hostname;

	get_bytes(&from, seed, sizeof seed);
	now.tv_sec = (time_t)get_u64(&from);
	now.tv_nsec = (long)get_u32(&from);
	hostname = get_string(&from);
	count = get_u32(&from);
	macs = from;
	for (uint32_t i = 0; i < count && !from.bad; i++) {
		(void)get_u32(&from);
		get_bytes(&from, mac, sizeof mac);
	}
	check(&from);
	if (flags & ~(uint32_t)(RENEW_RANDOM | RENEW_TIME))
		violation();
	if (!serves_machine)
		fail_with(EPERM, "identity");
	if (flags & RENEW_RANDOM)
		renew_random(seed);
	explicit_bzero(seed, sizeof seed);
	if (flags & RENEW_TIME && clock_settime(CLOCK_REALTIME, &now) < 0)
		note_failure("clock");
	if (hostname[0] && sethostname(hostname, strlen(hostname)) < 0)
		note_failure("hostname");
	for (uint32_t i = 0; i < count; i++) {
		uint32_t interface = get_u32(&macs);

		get_bytes(&macs, mac, sizeof mac);
		renew_mac(interface, mac);
	}
	if (failure)
		fail_with(failure, subject);
	succeed();
}
