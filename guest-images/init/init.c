/* tsvisor's guest init: PID 1 of the initramfs, and a few tools under other
 * names (see main below). Static, no C library, few system calls: on hosts
 * that interpret guest kernel mode each system call or page fault costs
 * milliseconds. */
#include "network.h"
#include "syscalls.h"

enum { PORT_MILESTONE = 0xf8, PORT_DEBUG_EXIT = 0xf4, PORT_SLEEP_CONTROL = 0x600 };
enum { MILESTONE_INIT = 1, MILESTONE_SHELL = 2 };
enum { SLEEP_S5 = 0x34 }; /* SLP_EN | S5 << 2 */
enum { GRACE_SECONDS = 2 };
enum { AGENT_RESTARTS = 100 };

/* As numbered by busybox halt, poweroff and reboot. */
enum action { HALT = SIGUSR1, POWEROFF = SIGUSR2, REBOOT = SIGTERM };

static char cmdline[4096];
static char applets[8192];
static char mounts[16384];
static char term[64] = "TERM=vt102";
static struct winsize window;
static char links_stack[4096] __attribute__((aligned(16)));
static int agent_wanted;
static unsigned cpus;
static const char *network; /* the interface, or null */
static long agent; /* its process, or 0 */

static char *const shell_argv[] = { "-sh", 0 };
static char *const agent_argv[] = { "tsvisor-agent", 0 };
static char *const shell_env[] = {
	"HOME=/root", "PATH=/bin:/sbin:/usr/bin:/usr/sbin", "USER=root",
	"SHELL=/bin/sh", term, 0,
};

/* iopl(3) and not ioperm: the latter fills and copies a permission bitmap. */
static int port_write(unsigned char value, unsigned short port)
{
	if (SYS1(iopl, 3) < 0)
		return -1;
	outb(value, port);
	SYS1(iopl, 0);
	return 0;
}

static long read_file(const char *path, char *buf, unsigned long size)
{
	long fd = SYS3(open, path, O_RDONLY, 0), n = 0, got;

	if (fd < 0)
		return fd;
	while ((unsigned long)n < size - 1 &&
	       (got = SYS3(read, fd, buf + n, size - 1 - (unsigned long)n)) > 0)
		n += got;
	buf[n] = 0;
	SYS1(close, fd);
	return n;
}

/* The archive holds only what cannot be made here, see build-initramfs.sh. A
 * root file system on a disk has it all: then these calls fail. */
static void make_directories(void)
{
	SYS1(umask, 0);
	SYS2(mkdir, "/proc", 0555);
	SYS2(mkdir, "/sys", 0555);
	SYS2(mkdir, "/root", 0700);
	SYS2(mkdir, "/run", 0755);
	SYS2(mkdir, "/tmp", 01777);
	SYS1(umask, 022);
	SYS2(chmod, "/", 0755);
	SYS2(link, "/bin/busybox", "/bin/sh");
	SYS2(link, "/init", "/bin/milestone");
	SYS2(link, "/init", "/bin/debug-exit");
}

static void mount_file_systems(void)
{
	const unsigned long safe = MS_NOSUID | MS_NOEXEC | MS_NODEV;

	SYS5(mount, "devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
	SYS5(mount, "proc", "/proc", "proc", safe, 0);
	SYS5(mount, "sysfs", "/sys", "sysfs", safe, 0);
	SYS2(mkdir, "/dev/pts", 0755);
	SYS5(mount, "devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
	     "mode=620,gid=5,ptmxmode=666");
}

/* tsvisor.term=, tsvisor.rows= and tsvisor.cols= describe the user's terminal;
 * tsvisor.agent asks for the agent, tsvisor.net=INTERFACE for its user-mode
 * network; tsvisor.cpus=N says how many CPUs to bring up. */
static void read_command_line(void)
{
	const char *value;
	char *p = cmdline;

	if (read_file("/proc/cmdline", cmdline, sizeof cmdline) < 0)
		return;
	while (*p) {
		char *word = p;

		while (*p && *p != ' ' && *p != '\n')
			p++;
		if (*p)
			*p++ = 0;
		if ((value = after(word, "tsvisor.rows=")))
			window.ws_row = (unsigned short)number(value);
		else if ((value = after(word, "tsvisor.cols=")))
			window.ws_col = (unsigned short)number(value);
		else if ((value = after(word, "tsvisor.term=")) &&
			 length(value) < sizeof term - 5)
			append(term + 5, value);
		else if (equal(word, "tsvisor.agent"))
			agent_wanted = 1;
		else if ((value = after(word, "tsvisor.net=")))
			network = value;
		else if ((value = after(word, "tsvisor.cpus=")))
			cpus = number(value);
	}
}

/* Those that the kernel left alone. Booted with all of them, one that has
 * nothing to do is woken again and again to look for work; interpreted, that
 * costs as much as the boot. */
static void start_cpus(void)
{
	char path[64];

	for (unsigned cpu = 1; cpu < cpus; cpu++) {
		char *end = append(path, "/sys/devices/system/cpu/cpu");
		long fd;

		append(append_number(end, cpu), "/online");
		fd = SYS3(open, path, O_WRONLY, 0);
		if (fd < 0)
			return;
		SYS3(write, fd, "1", 1);
		SYS1(close, fd);
	}
}

static void set_up_console(void)
{
	struct termios t;

	/* The kernel opened the archive's node, which devtmpfs now hides; reopen
	 * it so that ttyname works. */
	SYS1(close, 0);
	SYS3(open, "/dev/console", O_RDWR | O_NOCTTY, 0);
	SYS2(dup2, 0, 1);
	SYS2(dup2, 0, 2);

	/* Hardware flow control: the VMM's UART holds input while RTS is off. */
	if (SYS3(ioctl, 0, TCGETS, &t) == 0) {
		t.c_cflag |= CRTSCTS;
		SYS3(ioctl, 0, TCSETS, &t);
	}
	if (window.ws_row && window.ws_col)
		SYS3(ioctl, 0, TIOCSWINSZ, &window);
}

/* vfork: a fork would copy page tables. The child borrows this stack frame
 * until it execs, so this function must not return in the child. */
static long start_shell(void)
{
	long pid = SYS0(vfork);

	if (pid == 0) {
		SYS0(setsid);
		SYS3(ioctl, 0, TIOCSCTTY, 0);
		SYS3(execve, "/bin/sh", shell_argv, shell_env);
		SYS1(exit, 127);
	}
	return pid;
}

static void start_agent(void)
{
	long pid = SYS0(vfork);

	if (pid == 0) {
		SYS0(setsid);
		SYS3(execve, "/bin/tsvisor-agent", agent_argv, shell_env);
		SYS1(exit, 1);
	}
	agent = pid > 0 ? pid : 0;
}

/* An agent that gave up exits; one that was killed is started again. */
static void agent_ended(int status)
{
	static int restarts;

	agent = 0;
	if ((status & 0x7f) && restarts++ < AGENT_RESTARTS)
		start_agent();
}

/* Hard links for the applets, so that programs other than the shell find
 * them too; busybox sh itself needs none. Some 270 of them, and a few names
 * for tradition's sake, hence made while nothing else wants to run. What the
 * agent runs need not be the shell's: it waits until the list is gone. */
static int make_links(void)
{
	struct sched_param none = { 0 };
	char *p = applets;

	if (agent_wanted)
		SYS3(setpriority, 0, 0, 10);
	else
		SYS3(sched_setscheduler, 0, SCHED_IDLE, &none);
	bring_up_loopback();
	SYS2(symlink, "/proc/self/fd", "/dev/fd");
	SYS2(symlink, "fd/0", "/dev/stdin");
	SYS2(symlink, "fd/1", "/dev/stdout");
	SYS2(symlink, "fd/2", "/dev/stderr");
	SYS2(mkdir, "/usr", 0755);
	SYS2(mkdir, "/var", 0755);
	SYS2(symlink, "bin", "/sbin");
	SYS2(symlink, "../bin", "/usr/bin");
	SYS2(symlink, "../bin", "/usr/sbin");
	if (read_file("/etc/applets", applets, sizeof applets) < 0 ||
	    SYS1(chdir, "/bin") < 0)
		return 1;
	while (*p) {
		char *name = p;

		while (*p && *p != '\n')
			p++;
		if (*p)
			*p++ = 0;
		SYS2(link, "busybox", name);
	}
	SYS1(unlink, "/etc/applets");
	return 0;
}

/* Block devices and network file systems; the rest lives in memory. */
static int holds_data(const char *device, const char *type)
{
	return device[0] == '/' || equal(type, "9p") || equal(type, "virtiofs") ||
	       equal(type, "overlay") || after(type, "fuse");
}

/* Unmounts in reverse order; what is busy becomes read-only. */
static void unmount_all(void)
{
	char *line[256];
	unsigned count = 0;

	if (read_file("/proc/mounts", mounts, sizeof mounts) < 0)
		return;
	for (char *p = mounts; *p && count < 256;) {
		line[count++] = p;
		while (*p && *p != '\n')
			p++;
		if (*p)
			*p++ = 0;
	}
	while (count--) {
		char *field[3];
		char *p = line[count];

		for (int i = 0; i < 3; i++) {
			field[i] = p;
			while (*p && *p != ' ')
				p++;
			if (*p)
				*p++ = 0;
		}
		if (holds_data(field[0], field[2]) && SYS2(umount2, field[1], 0) < 0)
			SYS5(mount, 0, field[1], 0, MS_REMOUNT | MS_RDONLY, 0);
	}
}

static void leave(enum action action)
{
	if (action == REBOOT)
		SYS3(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
		     LINUX_REBOOT_CMD_RESTART);
	/* The port first: it ends the machine without the kernel's own path. */
	port_write(SLEEP_S5, PORT_SLEEP_CONTROL);
	SYS3(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
	     LINUX_REBOOT_CMD_POWER_OFF);
	for (;;)
		SYS0(pause);
}

/* Whether process `pid` has no children but these two, which may be 0. */
static int no_children_but(long pid, long first, long second)
{
	char path[64], text[64], *end = path;

	end = append_number(append(end, "/proc/"), (unsigned)pid);
	end = append_number(append(end, "/task/"), (unsigned)pid);
	append(end, "/children");
	if (read_file(path, text, sizeof text) < 0)
		return 0;
	for (const char *p = text; *p;) {
		long child = number(p);

		if (child != first && child != second)
			return 0;
		while (*p && *p++ != ' ')
			;
	}
	return 1;
}

/* The shell and the agent, idle. */
static int only_shell_runs(long shell)
{
	return no_children_but(1, shell, agent) && no_children_but(shell, 0, 0) &&
	       (!agent || no_children_but(agent, 0, 0));
}

/* SIGTERM, a grace period, SIGKILL. An idle shell is left alone: to tear its
 * address space down would take longer than all the rest. */
static void stop_processes(long shell)
{
	static const unsigned long child = 1ul << (SIGCHLD - 1);
	static const struct timespec step = { 0, 100 * 1000 * 1000 };
	int steps = GRACE_SECONDS * 10, exits = 1000;
	long pid;

	while ((pid = SYS4(wait4, -1, 0, WNOHANG, 0)) > 0)
		if (pid == shell)
			shell = 0;
	if (pid < 0 || (shell && only_shell_runs(shell)))
		return;
	SYS2(kill, -1, SIGTERM);
	if (shell)
		SYS2(kill, shell, SIGHUP); /* interactive shells ignore SIGTERM */
	while (steps > 0 && exits-- > 0) {
		while ((pid = SYS4(wait4, -1, 0, WNOHANG, 0)) > 0)
			;
		if (pid < 0)
			return;
		if (SYS4(rt_sigtimedwait, &child, 0, &step, sizeof child) < 0)
			steps--;
	}
	SYS2(kill, -1, SIGKILL);
}

static void stop_everything(long shell, enum action action)
{
	print(action == REBOOT ? "tsvisor: restarting\n" : "tsvisor: powering off\n");
	stop_processes(shell);
	SYS0(sync);
	unmount_all();
	SYS3(ioctl, 2, TCSBRK, 1); /* let the console drain */
	leave(action);
}

static void run_as_init(void)
{
	unsigned long signals = 1ul << (SIGCHLD - 1) | 1ul << (SIGUSR1 - 1) |
				1ul << (SIGUSR2 - 1) | 1ul << (SIGTERM - 1) |
				1ul << (SIGINT - 1) | 1ul << (SIGPWR - 1);
	long shell, pid, sig;
	int status;

	port_write(MILESTONE_INIT, PORT_MILESTONE);
	make_directories();
	mount_file_systems();
	read_command_line();
	set_up_console();
	SYS2(sethostname, "tsvisor", 7);
	if (network)
		join_user_network(network);
	start_cpus();
	port_write(MILESTONE_SHELL, PORT_MILESTONE);
	shell = start_shell();
	if (agent_wanted)
		start_agent();
	spawn(make_links, links_stack + sizeof links_stack, SIGCHLD);

	SYS4(rt_sigprocmask, SIG_BLOCK, &signals, 0, sizeof signals);
	for (;;) {
		while ((pid = SYS4(wait4, -1, &status, WNOHANG, 0)) > 0) {
			if (pid == shell)
				stop_everything(0, POWEROFF);
			if (pid == agent)
				agent_ended(status);
		}
		sig = SYS4(rt_sigtimedwait, &signals, 0, 0, sizeof signals);
		if (sig == SIGTERM || sig == SIGINT)
			stop_everything(shell, REBOOT);
		if (sig == SIGUSR1 || sig == SIGUSR2 || sig == SIGPWR)
			stop_everything(shell, POWEROFF);
	}
}

/* poweroff, halt, reboot: ask init; with -f do it at once. */
static int ask_init(enum action action, int argc, char **argv)
{
	if (argc > 1 && equal(argv[1], "-f")) {
		SYS0(sync);
		leave(action);
	}
	if (SYS2(kill, 1, action) < 0) {
		print("not permitted\n");
		return 1;
	}
	for (;;)
		SYS0(pause); /* no new prompt meanwhile */
}

static int port_tool(const char *name, unsigned short port, int argc, char **argv)
{
	if (argc != 2 || number(argv[1]) > 255) {
		print("usage: ");
		print(name);
		print(" NUMBER (0 to 255)\n");
		return 2;
	}
	if (port_write((unsigned char)number(argv[1]), port) < 0) {
		print(name);
		print(": no access to I/O ports\n");
		return 1;
	}
	return 0;
}

static int run(int argc, char **argv)
{
	const char *name = argc > 0 ? argv[0] : "";

	for (const char *p = name; *p; p++)
		if (*p == '/')
			name = p + 1;
	if (equal(name, "poweroff"))
		return ask_init(POWEROFF, argc, argv);
	if (equal(name, "halt"))
		return ask_init(HALT, argc, argv);
	if (equal(name, "reboot"))
		return ask_init(REBOOT, argc, argv);
	if (equal(name, "milestone"))
		return port_tool(name, PORT_MILESTONE, argc, argv);
	if (equal(name, "debug-exit"))
		return port_tool(name, PORT_DEBUG_EXIT, argc, argv);
	if (SYS0(getpid) == 1)
		run_as_init();
	print("init: this is tsvisor's PID 1\n");
	return 1;
}

__attribute__((used)) static void start(long *stack)
{
	SYS1(exit_group, run((int)stack[0], (char **)(stack + 1)));
}

__asm__(".globl _start\n"
	"_start:\n\t"
	"xor %ebp, %ebp\n\t"
	"mov %rsp, %rdi\n\t"
	"and $-16, %rsp\n\t"
	"call start\n");
