/* fsync-log FILE: appends numbered records for ever. Prints a number once its record and all before it are on the disk.
 * A record is 512 bytes that depend on its number, so that one that is torn or from elsewhere shows. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	uint32_t record[128];
	int fd = argc == 2 ? open(argv[1], O_RDWR | O_CREAT | O_APPEND, 0644) : -1;

	if (fd < 0)
		return 1;
	for (uint32_t number = 0;; number++) {
		uint32_t word = number;

		for (int i = 0; i < 128; i++) {
			record[i] = word;
			word = word * 1664525 + 1013904223;
		}
		if (write(fd, record, sizeof record) != sizeof record || fsync(fd) != 0)
			return 1;
		printf("synced %u.\n", number);
		fflush(stdout);
	}
}
