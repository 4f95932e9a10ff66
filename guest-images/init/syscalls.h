/* The few Linux x86-64 system calls that init needs, without a C library:
 * a static libc would cost page faults and system calls before main(). */
#pragma once

#include <asm-generic/fcntl.h>
#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <asm/termios.h>
#include <asm/unistd.h>
#include <linux/mount.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <linux/signal.h>
#include <linux/stat.h>
#include <linux/wait.h>

__attribute__((always_inline)) static inline long syscall4(long n, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long ret;

	__asm__ volatile("syscall" : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return ret;
}

__attribute__((always_inline)) static inline long syscall5(long n, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long ret;

	__asm__ volatile("syscall" : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return ret;
}

#define SYS0(name) syscall4(__NR_##name, 0, 0, 0, 0)
#define SYS1(name, a) syscall4(__NR_##name, (long)(a), 0, 0, 0)
#define SYS2(name, a, b) syscall4(__NR_##name, (long)(a), (long)(b), 0, 0)
#define SYS3(name, a, b, c) syscall4(__NR_##name, (long)(a), (long)(b), (long)(c), 0)
#define SYS4(name, a, b, c, d) \
	syscall4(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d))
#define SYS5(name, a, b, c, d, e) \
	syscall5(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

/* Runs fn on its own stack as a child that shares this memory, then exits. */
static inline long spawn(int (*fn)(void), void *stack_end, unsigned long flags)
{
	long ret;

	__asm__ volatile("syscall\n\t"
			 "test %0, %0\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "call *%5\n\t"
			 "mov %%eax, %%edi\n\t"
			 "mov %6, %%eax\n\t"
			 "syscall\n"
			 "1:"
			 : "=a"(ret)
			 : "a"(__NR_clone), "D"(flags | CLONE_VM), "S"(stack_end),
			   "d"(0), "b"(fn), "i"(__NR_exit)
			 : "rcx", "r8", "r9", "r10", "r11", "memory");
	return ret;
}

static inline void outb(unsigned char value, unsigned short port)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline unsigned long length(const char *s)
{
	unsigned long n = 0;

	while (s[n])
		n++;
	return n;
}

static inline int equal(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* The text behind `prefix` in `s`, or null. */
static inline const char *after(const char *s, const char *prefix)
{
	while (*prefix)
		if (*s++ != *prefix++)
			return 0;
	return s;
}

/* Copies `s` with its zero and returns the place of that zero. */
static inline char *append(char *to, const char *s)
{
	while ((*to = *s++))
		to++;
	return to;
}

/* In decimal. Returns the end, as append does. */
static inline char *append_number(char *to, unsigned value)
{
	char digits[11], *d = digits + sizeof digits - 1;

	*d = 0;
	do
		*--d = (char)('0' + value % 10);
	while (value /= 10);
	return append(to, d);
}

static inline unsigned number(const char *s)
{
	unsigned n = 0;

	while (*s >= '0' && *s <= '9')
		n = n * 10 + (unsigned)(*s++ - '0');
	return n;
}

static inline void print(const char *s)
{
	SYS3(write, 2, s, length(s));
}
