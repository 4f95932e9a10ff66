#define _GNU_SOURCE
#include "text.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

long read_text(int folder, const char *path, char *text, size_t size)
{
	int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
	size_t length = 0;
	ssize_t got;

	text[0] = 0;
	if (fd < 0)
		return -1;
	while (length < size - 1 && (got = read(fd, text + length, size - 1 - length)) > 0)
		length += (size_t)got;
	text[length] = 0;
	close(fd);
	return (long)length;
}

unsigned long read_number(const char **text, unsigned base)
{
	unsigned long number = 0;

	for (;; (*text)++) {
		unsigned char c = (unsigned char)**text;
		unsigned digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 16;

		if (digit >= base)
			return number;
		number = number > (ULONG_MAX - digit) / base ? ULONG_MAX : number * base + digit;
	}
}

int append(char *text, size_t size, const char *more)
{
	size_t length = strlen(text), added = strlen(more);

	if (added >= size - length)
		return 0;
	memcpy(text + length, more, added + 1);
	return 1;
}

int append_number(char *text, size_t size, unsigned long number)
{
	char digits[24] = { 0 }, *first = digits + sizeof digits - 1;

	do
		*--first = (char)('0' + number % 10);
	while (number /= 10);
	return append(text, size, first);
}

const char *next_name(struct folder *folder)
{
	for (;;) {
		struct dirent *entry;

		errno = 0;
		if (folder->at >= folder->length) {
			folder->at = 0;
			folder->length = syscall(SYS_getdents64, folder->fd, folder->entries, sizeof folder->entries);
			if (folder->length <= 0)
				return 0;
		}
		entry = (struct dirent *)(folder->entries + folder->at);
		folder->at += entry->d_reclen;
		if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
			return entry->d_name;
	}
}
