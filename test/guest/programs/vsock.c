/* vsock COMMAND: both ends of AF_VSOCK connections, for test/guest/vsock.test.ts.
 *   serve FIRST       listens on five ports from FIRST on, until it is killed:
 *                     +0 sends back what it gets; +1 answers the end of its input with length and FNV-1a;
 *                     +2 sends as many bytes of a pattern as the first line asks for; +3 closes at once;
 *                     +4 takes input no further than its first byte, and tells how the connection ended on stdout
 *   send PORT LENGTH  sends a pattern to that port of the host, ends it and prints the answer
 *   fetch PORT        prints length and FNV-1a of what that port of the host sends
 *   reboot PORT       connects to that port of the host and resets the machine at once
 *   open PORT COUNT   has so many connections at once to that port of the host: each sends its number and gets it back */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define CLIENTS 100
#define SERVICES 5

struct sum {
	uint32_t hash;
	size_t length;
};

static char buffer[65536];

static void add(struct sum *sum, size_t length)
{
	for (size_t i = 0; i < length; i++)
		sum->hash = (sum->hash ^ (uint8_t)buffer[i]) * 16777619;
	sum->length += length;
}

static int tell(const struct sum *sum, char *text)
{
	return sprintf(text, "%zu %08x\n", sum->length, sum->hash);
}

static void fail(const char *what)
{
	printf("%s: %s\n", what, strerror(errno));
	exit(1);
}

static int send_all(int fd, const char *bytes, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t count = write(fd, bytes + done, length - done);

		if (count < 0)
			return -1;
		done += count;
	}
	return 0;
}

/* Byte i is the top of i * 2654435761, as the test computes it. */
static int send_pattern(int fd, size_t length)
{
	for (size_t done = 0; done < length;) {
		size_t part = length - done < sizeof buffer ? length - done : sizeof buffer;

		for (size_t i = 0; i < part; i++)
			buffer[i] = (uint32_t)((done + i) * 2654435761u) >> 24;
		if (send_all(fd, buffer, part))
			return -1;
		done += part;
	}
	return 0;
}

static int connect_to(unsigned int port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
		fail("connect");
	return fd;
}

static int listen_on(unsigned int port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, CLIENTS))
		fail("listen");
	return fd;
}

/* Serves what a client has sent. Returns whether there is to be more. */
static int serve_client(int service, int fd, struct sum *sum)
{
	ssize_t count = service == 3 ? 0 : read(fd, buffer, service == 4 ? 1 : sizeof buffer - 1);

	if (service == 4 && count == 1) {
		char rest;

		printf("holding.\n");
		fflush(stdout);
		while (recv(fd, &rest, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN)
			usleep(10000);
		while (write(fd, "x", 1) == 1)
			usleep(10000);
		printf("write failed: %s.\n", strerror(errno));
		fflush(stdout);
		return 0;
	}
	if (count > 0 && service == 0)
		return send_all(fd, buffer, count) == 0;
	if (count > 0 && service == 1) {
		add(sum, count);
		return 1;
	}
	if (count > 0 && service == 2) {
		buffer[count] = 0;
		send_pattern(fd, atol(buffer));
	} else if (count == 0 && service == 1) {
		char text[64];

		send_all(fd, text, tell(sum, text));
	}
	return 0;
}

static void serve(unsigned int first)
{
	struct pollfd fds[SERVICES + CLIENTS];
	struct sum sums[SERVICES + CLIENTS];
	int services[SERVICES + CLIENTS];
	int count = SERVICES;

	for (int i = 0; i < SERVICES; i++)
		fds[i] = (struct pollfd){ listen_on(first + i), POLLIN, 0 };
	printf("serving.\n");
	fflush(stdout);
	for (;;) {
		poll(fds, count, -1);
		for (int i = SERVICES; i < count; i++) {
			if (!fds[i].revents || serve_client(services[i], fds[i].fd, &sums[i]))
				continue;
			close(fds[i].fd);
			count--;
			fds[i] = fds[count];
			sums[i] = sums[count];
			services[i] = services[count];
			i--;
		}
		for (int i = 0; i < SERVICES; i++) {
			if (!fds[i].revents || count == SERVICES + CLIENTS)
				continue;
			fds[count] = (struct pollfd){ accept(fds[i].fd, NULL, NULL), POLLIN, 0 };
			sums[count] = (struct sum){ 2166136261u, 0 };
			services[count++] = i;
		}
	}
}

static void print_sum(int fd)
{
	struct sum sum = { 2166136261u, 0 };
	char text[64];
	ssize_t count;

	while ((count = read(fd, buffer, sizeof buffer)) > 0)
		add(&sum, count);
	if (count < 0)
		fail("read");
	tell(&sum, text);
	printf("%s", text);
}

static void open_many(unsigned int port, int count)
{
	int fds[CLIENTS];
	int good = 0;

	for (int i = 0; i < count; i++)
		fds[i] = connect_to(port);
	for (int i = 0; i < count; i++)
		if (send_all(fds[i], (char *)&i, sizeof i))
			fail("write");
	for (int i = 0; i < count; i++) {
		int answer = -1;

		if (read(fds[i], &answer, sizeof answer) == sizeof answer && answer == i)
			good++;
	}
	printf("%d good.\n", good);
}

int main(int argc, char **argv)
{
	const char *command = argc > 2 ? argv[1] : "";
	unsigned int port = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;

	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(command, "serve")) {
		serve(port);
	} else if (!strcmp(command, "fetch")) {
		print_sum(connect_to(port));
	} else if (!strcmp(command, "reboot")) {
		connect_to(port);
		reboot(RB_AUTOBOOT);
	} else if (!strcmp(command, "open") && argc > 3 && atoi(argv[3]) <= CLIENTS) {
		open_many(port, atoi(argv[3]));
	} else if (!strcmp(command, "send") && argc > 3) {
		int fd = connect_to(port);
		ssize_t count;

		if (send_pattern(fd, strtoul(argv[3], NULL, 10)) || shutdown(fd, SHUT_WR))
			fail("write");
		while ((count = read(fd, buffer, sizeof buffer)) > 0)
			fwrite(buffer, 1, count, stdout);
	} else {
		return 2;
	}
	return 0;
}
