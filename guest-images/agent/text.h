/* What the C library has too, but with its streams, formats and heap behind it: these would double the program. */
#pragma once

#include <dirent.h>
#include <stddef.h>

/* Reads what fits of a file and ends it with a zero. Its length, or -1. */
long read_text(int folder, const char *path, char *text, size_t size);
/* Reads digits of this base at *text and moves it behind them. Too many give ULONG_MAX. */
unsigned long read_number(const char **text, unsigned base);
/* Appends to a string in a buffer of `size` bytes; 0 if it has no room. */
int append(char *text, size_t size, const char *more);
/* Appends a number in decimal. */
int append_number(char *text, size_t size, unsigned long number);

/* A folder that is being read: open, and with this on the stack. */
struct folder {
	int fd;
	long length, at;
	char entries[4096] __attribute__((aligned(8)));
};

/* The next name but . and .., or null at the end, or with errno. */
const char *next_name(struct folder *folder);
