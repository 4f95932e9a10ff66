/* SHUTDOWN and SET_TIME: of the machine that the agent runs in, never of a host that tests it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/io.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

#include "operations.h"
#include "text.h"

/* By the numbers of the kernel and glibc; SIGRTMIN of another C library is another. */
enum { SYSTEMD_POWEROFF = 34 + 4, SYSTEMD_REBOOT = 34 + 5 };
/* The machine's sleep control register (ACPI 6.5 section 4.8.3.7): SLP_EN, S5. */
enum { SLEEP_PORT = 0x600, SLEEP_S5 = 0x34 };

static unsigned long signals(const char *status, const char *field)
{
	const char *at = strstr(status, field);

	if (!at)
		return 0;
	at += strlen(field);
	return read_number(&at, 16);
}

/* The signals that PID 1 catches, or takes by waiting while they are blocked. */
static unsigned long init_signals(void)
{
	static char status[4096];

	read_text(proc_fd, "1/status", status, sizeof status);
	return signals(status, "SigBlk:\t") | signals(status, "SigCgt:\t");
}

static void ask_init(int restart)
{
	unsigned long taken = init_signals();
	int wanted = restart ? SYSTEMD_REBOOT : SYSTEMD_POWEROFF;

	if (!(taken & 1ul << (wanted - 1))) {
		/* busybox and tsvisor's own */
		if (!(taken & 1ul << (SIGUSR2 - 1)))
			return;
		wanted = restart ? SIGTERM : SIGUSR2;
	}
	if (kill(1, wanted) == 0)
		succeed();
}

void operate_shutdown(const struct frame *request)
{
	struct reader from = read_frame(request);
	uint32_t restart = get_u32(&from);

	check(&from);
	if (restart > 1)
		violation();
	if (!serves_machine)
		fail_with(EPERM, "shutdown");
	sync();
	ask_init((int)restart);
	/* PID 1 takes no such signal. */
	begin(OK);
	end();
	finish();
	if (!restart && iopl(3) == 0)
		__asm__ volatile("outb %0, %1" : : "a"((unsigned char)SLEEP_S5), "Nd"((unsigned short)SLEEP_PORT));
	reboot(restart ? RB_AUTOBOOT : RB_POWER_OFF);
	_exit(1);
}

void operate_set_time(const struct frame *request)
{
	struct reader from = read_frame(request);
	struct timespec now = { .tv_sec = (time_t)get_u64(&from) };

	now.tv_nsec = (long)get_u32(&from);
	check(&from);
	if (!serves_machine)
		fail_with(EPERM, "clock");
	if (clock_settime(CLOCK_REALTIME, &now) < 0)
		fail("clock");
	succeed();
}
