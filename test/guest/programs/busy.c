/* Work whose every step can be checked, for machines that are saved in the middle of it: `busy DISK HOST PORT STATUS`.
 * Three processes: one computes, one writes and reads a disk, one talks to an echo server. Each keeps a line in a file
 * STATUS.compute, .disk or .net; what is found to be wrong goes to STATUS.wrong. They rest in between: a kernel that is
 * interpreted has little time. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS = 256, MESSAGE = 3000 };

static const char *status;

static void wrong(const char *what, unsigned long n)
{
	char path[200];
	FILE *file;

	snprintf(path, sizeof path, "%s.wrong", status);
	file = fopen(path, "a");
	if (file) {
		fprintf(file, "%s %lu errno %d\n", what, n, errno);
		fclose(file);
	}
}

/* A line as long as any other, so that it is never seen in part. */
static void report(const char *name, unsigned long a, unsigned long b, double c)
{
	static int fd = -1;
	char line[100];
	char path[200];

	if (fd < 0) {
		snprintf(path, sizeof path, "%s.%s", status, name);
		fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	}
	snprintf(line, sizeof line, "%20lu %20lu %24.17e\n", a, b, c);
	if (pwrite(fd, line, strlen(line), 0) != (ssize_t)strlen(line))
		wrong("report", a);
}

/* A linear congruential generator (Knuth's MMIX), whose state after n steps the host can tell; and a sum in doubles. */
static void compute(void)
{
	uint64_t x = 1;
	double sum = 0;

	for (unsigned long n = 1;; n++) {
		x = x * 6364136223846793005u + 1442695040888963407u;
		sum += 1.0 / (double)(n % 1000 + 1);
		if (n % 1000000 == 0) {
			report("compute", n, x, sum);
			usleep(100000);
		}
	}
}

static void fill(uint32_t *block, unsigned long seed)
{
	for (unsigned i = 0; i < BLOCK / 4; i++)
		block[i] = (uint32_t)(seed * 2654435761u + i);
}

static void disk(const char *path)
{
	static uint32_t block[BLOCK / 4], expected[BLOCK / 4];
	int fd = open(path, O_RDWR);

	for (unsigned long n = 0;; n++) {
		off_t at = (off_t)(n % BLOCKS) * BLOCK;

		if (n >= BLOCKS) {
			fill(expected, n - BLOCKS);
			posix_fadvise(fd, at, BLOCK, POSIX_FADV_DONTNEED);
			if (pread(fd, block, BLOCK, at) != BLOCK || memcmp(block, expected, BLOCK))
				wrong("disk", n);
		}
		fill(block, n);
		if (pwrite(fd, block, BLOCK, at) != BLOCK || (n % 16 == 0 && fdatasync(fd)))
			wrong("disk write", n);
		report("disk", n, 0, 0);
		usleep(200000);
	}
}

/* A connection of before a restore is no more: it is to fail, not to lie. */
static void net(const char *host, int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	struct timeval patience = { .tv_sec = 5 };
	static uint32_t sent[BLOCK / 4];
	static char back[MESSAGE];
	unsigned long lost = 0;

	inet_pton(AF_INET, host, &address.sin_addr);
	for (unsigned long n = 0;; n++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0), done = 0;

		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
		fill(sent, n);
		if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 && send(fd, sent, MESSAGE, MSG_NOSIGNAL) == MESSAGE) {
			while (done < MESSAGE) {
				ssize_t more = recv(fd, back + done, (size_t)(MESSAGE - done), 0);

				if (more <= 0)
					break;
				done += (int)more;
			}
			if (memcmp(back, sent, (size_t)done))
				wrong("net", n);
		}
		if (done < MESSAGE)
			lost++;
		close(fd);
		report("net", n, lost, 0);
		usleep(300000);
	}
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	status = argv[4];
	setsid();
	for (int i = 0; i < 3; i++) {
		if (fork())
			continue;
		if (i == 0)
			compute();
		else if (i == 1)
			disk(argv[1]);
		else
			net(argv[2], atoi(argv[3]));
	}
	return 0;
}
