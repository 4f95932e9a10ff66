/* Network interfaces, by the ioctls that ifconfig and route use. */
#pragma once

#include "syscalls.h"

#include <linux/in.h>
#include <linux/sockios.h>

/* linux/if.h and linux/route.h need a C library: ifreq and rtentry are here as these ioctls use them. */
enum { AF_INET = 2, SOCK_DGRAM = 2, IFF_UP = 0x1, IFF_RUNNING = 0x40, RTF_UP = 0x1, RTF_GATEWAY = 0x2 };

struct interface_request {
	char name[16];
	union {
		struct sockaddr_in address;
		short flags;
		char room[24];
	};
};

struct route_request {
	unsigned long unused;
	struct sockaddr_in destination, gateway, mask;
	unsigned short flags;
	char rest[62];
};

#define IPV4(a, b, c, d) ((a) | (b) << 8 | (c) << 16 | (unsigned)(d) << 24)

static inline struct sockaddr_in ipv4(unsigned address)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = address };

	return to;
}

static inline long set_address(int sock, struct interface_request *interface, unsigned long request, unsigned address)
{
	interface->address = ipv4(address);
	return SYS3(ioctl, sock, request, interface);
}

/* An address of 0 leaves the one that the interface has, as lo does of itself. */
static inline long bring_up(int sock, const char *name, unsigned address, unsigned mask)
{
	struct interface_request interface = { 0 };

	if (length(name) >= sizeof interface.name)
		return -1;
	append(interface.name, name);
	if (address && (set_address(sock, &interface, SIOCSIFADDR, address) < 0 ||
			set_address(sock, &interface, SIOCSIFNETMASK, mask) < 0))
		return -1;
	interface.flags = IFF_UP | IFF_RUNNING;
	return SYS3(ioctl, sock, SIOCSIFFLAGS, &interface);
}

static inline void bring_up_loopback(void)
{
	long sock = SYS3(socket, AF_INET, SOCK_DGRAM, 0);

	if (sock < 0)
		return;
	bring_up((int)sock, "lo", 0, 0);
	SYS1(close, sock);
}

/* What tsvisor's user-mode network gives a guest by DHCP. */
static inline void join_user_network(const char *interface)
{
	static const char resolver[] = "nameserver 10.0.2.3\n";
	struct route_request route = { .flags = RTF_UP | RTF_GATEWAY };
	long sock = SYS3(socket, AF_INET, SOCK_DGRAM, 0), fd;

	if (sock < 0)
		return;
	route.destination = route.mask = ipv4(0);
	route.gateway = ipv4(IPV4(10, 0, 2, 2));
	if (bring_up((int)sock, interface, IPV4(10, 0, 2, 15), IPV4(255, 255, 255, 0)) == 0)
		SYS3(ioctl, sock, SIOCADDRT, &route);
	SYS1(close, sock);
	fd = SYS3(open, "/etc/resolv.conf", O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0)
		return;
	SYS3(write, fd, resolver, sizeof resolver - 1);
	SYS1(close, fd);
}
