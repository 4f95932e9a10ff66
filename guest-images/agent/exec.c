/* EXEC: a process with its standard streams, or on a terminal. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "operations.h"
#include "user.h"

/* Seconds between SIGTERM and SIGKILL, when the client is gone. */
enum { GRACE_SECONDS = 2 };
/* Milliseconds without output from a terminal after which nothing more of an exited process is expected. */
enum { TERMINAL_QUIET = 100 };
/* Bytes that an exited process can have left in a terminal. */
enum { TERMINAL_REST = 64 * 1024 };

/* Milliseconds that the links of /bin may take. */
enum { LINKS_PATIENCE = 30 * 1000, LINKS_STEP = 50 };

/* A stream that the process writes to. */
struct output {
	int fd; /* -1 once it has ended for the client */
	enum frame_type type;
	uint32_t credit;
	uint32_t rest; /* bytes still to come once the process has exited */
};

static struct {
	pid_t pid;
	int terminal, detached;
	int exited;   /* and reaped */
	int input_fd; /* -1 once closed */
	int input_ended;
	uint32_t input_used; /* bytes written since the last CREDIT */
	struct output output[2];
	int discard[2]; /* what background processes go on writing to */
} process;

/* Arguments, and variables of the environment. */
enum { MAX_WORDS = 32 * 1024 };

static unsigned char input[STDIN_WINDOW];
static size_t input_start, input_end;

static void on_child(int signal) { (void)signal; }

/* Adds what the caller did not set; the strings are the request's or static. */
static char **environment(struct reader *from, uint32_t count, const struct user *user, int terminal)
{
	static char home[264], name[72], logname[72], shell[264];
	char *defaults[] = { "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			     home, name, logname, shell, terminal ? "TERM=linux" : 0 };
	static char *list[MAX_WORDS + 7];
	uint32_t used = 0;

	if (count > MAX_WORDS)
		fail_with(E2BIG, "environment");
	while (used < count)
		list[used++] = get_string(from);
	strcat(strcpy(home, "HOME="), user->home);
	strcat(strcpy(name, "USER="), user->name[0] ? user->name : "root");
	strcat(strcpy(logname, "LOGNAME="), user->name[0] ? user->name : "root");
	strcat(strcpy(shell, "SHELL="), user->shell);
	for (int i = 0; i < 6 && defaults[i]; i++) {
		size_t key = strcspn(defaults[i], "=") + 1;
		uint32_t j = 0;

		while (j < count && strncmp(list[j], defaults[i], key) != 0)
			j++;
		if (j == count)
			list[used++] = defaults[i];
	}
	return list;
}

static char **arguments(struct reader *from)
{
	uint32_t count = get_u32(from);
	static char *list[MAX_WORDS + 1];

	if (count == 0)
		violation();
	if (count > MAX_WORDS)
		fail_with(E2BIG, "arguments");
	for (uint32_t i = 0; i < count; i++)
		list[i] = get_string(from);
	return list;
}

struct start {
	char **arguments, **environment;
	const char *directory;
	const struct user *user;
	int stdio[3];
};

/* What kept the child from its program; it shares this memory until then. */
static volatile struct {
	int error;
	const char *subject;
} failure;

/* What an error is about, as "user nobody". */
static const char *named(const char *kind, const char *name)
{
	static char text[32 + MAX_PATH];

	strcat(strcpy(text, kind), " ");
	return strncat(text, name, MAX_PATH);
}

static void give_up(const char *subject) __attribute__((noreturn));

static void give_up(const char *subject)
{
	failure.error = errno;
	failure.subject = subject;
	_exit(127);
}

static void become(const struct start *start) __attribute__((noreturn));

/* In the child: from here to the program. System calls by number: the C library's set the ids of every thread. */
static void become(const struct start *start)
{
	const struct user *user = start->user;
	sigset_t none;

	sigemptyset(&none);
	setsid();
	if (process.terminal) {
		ioctl(start->stdio[0], TIOCSCTTY, 0);
		(void)!fchown(start->stdio[0], user->uid, (gid_t)-1);
	}
	for (int fd = 0; fd < 3; fd++)
		if (dup2(start->stdio[fd], fd) < 0)
			give_up("streams");
	umask(022);
	if (user->uid != geteuid() || user->gid != getegid() || user->group_count > 1)
		if (syscall(SYS_setgroups, user->group_count, user->groups) < 0 || syscall(SYS_setgid, user->gid) < 0 ||
		    syscall(SYS_setuid, user->uid) < 0)
			give_up(named("user", user->name));
	if (start->directory[0] ? chdir(start->directory) < 0 : chdir(user->home) < 0 && chdir("/") < 0)
		give_up(named("folder", start->directory[0] ? start->directory : user->home));
	signal(SIGPIPE, SIG_DFL);
	sigprocmask(SIG_SETMASK, &none, 0);
	environ = start->environment;
	execvp(start->arguments[0], start->arguments);
	give_up(start->arguments[0]);
}

static void open_terminal(struct start *start, unsigned rows, unsigned columns)
{
	struct winsize size = { .ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns };
	int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK), slave;

	if (master < 0 || unlockpt(master) < 0)
		fail("/dev/ptmx");
	slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC); /* Linux 4.13 */
	if (slave < 0)
		fail("/dev/ptmx");
	ioctl(master, TIOCSWINSZ, &size);
	process.input_fd = master;
	process.output[0].fd = fcntl(master, F_DUPFD_CLOEXEC, 0);
	process.output[1].fd = -1;
	for (int i = 0; i < 3; i++)
		start->stdio[i] = slave;
}

static void open_pipes(struct start *start)
{
	int in[2], out[2], err[2];

	if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
		fail("pipe");
	process.input_fd = in[1];
	process.output[0].fd = out[0];
	process.output[1].fd = err[0];
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	fcntl(out[0], F_SETFL, O_NONBLOCK);
	fcntl(err[0], F_SETFL, O_NONBLOCK);
	start->stdio[0] = in[0];
	start->stdio[1] = out[1];
	start->stdio[2] = err[1];
}

/* tsvisor's init makes the links of /bin from this list after it has started the agent, and removes it when it is done.
 * The shell needs no links. */
static void wait_for_links(const char *program)
{
	for (int waited = 0; waited < LINKS_PATIENCE && !strchr(program, '/'); waited += LINKS_STEP) {
		if (access("/etc/applets", F_OK) < 0)
			return;
		poll(0, 0, LINKS_STEP);
	}
}

static void run(struct start *start)
{
	/* Not fork(): it would copy page tables, and pages as they are written. */
	pid_t pid = vfork();

	if (pid < 0)
		fail("vfork");
	if (pid == 0)
		become(start);
	process.pid = pid;
	if (failure.error)
		fail_with(failure.error, failure.subject);
	for (int i = 0; i < (process.terminal ? 1 : 3); i++)
		close(start->stdio[i]);
}

static void close_input(void)
{
	if (process.input_fd >= 0)
		close(process.input_fd);
	process.input_fd = -1;
	input_start = input_end = 0;
}

static void take_input(const struct frame *frame)
{
	if (process.input_ended)
		violation();
	if (frame->length == 0) {
		process.input_ended = 1;
		return;
	}
	if (process.input_fd < 0)
		return; /* it was sent before STDIN_CLOSED arrived */
	if (input_start > 0) {
		memmove(input, input + input_start, input_end - input_start);
		input_end -= input_start;
		input_start = 0;
	}
	if (frame->length > sizeof input - input_end)
		violation();
	memcpy(input + input_end, frame->data, frame->length);
	input_end += frame->length;
}

static void write_input(void)
{
	while (input_start < input_end) {
		ssize_t done = write(process.input_fd, input + input_start, input_end - input_start);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && errno == EAGAIN)
			return;
		if (done < 0) {
			close_input();
			begin(STDIN_CLOSED);
			end();
			return;
		}
		input_start += (size_t)done;
		process.input_used += (uint32_t)done;
	}
	input_start = input_end = 0;
	if (process.input_ended) {
		/* A terminal has no end; its line discipline makes one of ^D at the start of a line. */
		if (!process.terminal)
			close_input();
		else if (write(process.input_fd, "\4", 1) == 1)
			process.input_ended = 0, close_input();
	}
}

static void give_credit(void)
{
	if (process.input_used < STDIN_WINDOW / 2 && (input_start < input_end || process.input_used == 0))
		return;
	begin(CREDIT);
	put_u32(0);
	put_u32(process.input_used);
	end();
	process.input_used = 0;
}

static void take_credit(struct reader *from)
{
	uint32_t stream = get_u32(from), bytes = get_u32(from);
	struct output *output = &process.output[stream == 2];

	check(from);
	if (stream < 1 || stream > 2 || bytes > OUTPUT_WINDOW - output->credit)
		violation();
	output->credit += bytes;
}

static void terminate(void);

static void take_frames(void)
{
	struct frame frame;

	while (next_frame(&frame)) {
		struct reader from = read_frame(&frame);
		uint32_t value;

		switch (frame.type) {
		case STDIN:
			take_input(&frame);
			break;
		case CREDIT:
			take_credit(&from);
			break;
		case SIGNAL:
			value = get_u32(&from);
			check(&from);
			if (value < 1 || value > 64)
				violation();
			if (!process.exited)
				kill(-process.pid, (int)value);
			break;
		case RESIZE: {
			struct winsize size = { .ws_row = (unsigned short)get_u32(&from) };

			size.ws_col = (unsigned short)get_u32(&from);
			check(&from);
			if (process.terminal && process.output[0].fd >= 0)
				ioctl(process.output[0].fd, TIOCSWINSZ, &size);
			break;
		}
		case TERMINATE:
			check(&from);
			if (frame.length)
				violation();
			terminate();
			break;
		default:
			violation();
		}
	}
}

static void end_output(struct output *output)
{
	/* Background processes may hold the other end for long: their output is read, and lost. */
	process.discard[output - process.output] = process.terminal ? -1 : output->fd;
	if (process.terminal)
		close(output->fd);
	output->fd = -1;
	data_room();
	data_commit(output->type, 0);
}

/* Whether there may be more now. */
static int read_output(struct output *output)
{
	size_t most = output->credit < MAX_DATA ? output->credit : MAX_DATA;
	ssize_t got;

	if (process.exited && output->rest < most)
		most = output->rest;
	if (process.exited && most == 0) {
		if (output->rest == 0)
			end_output(output);
		return 0;
	}
	got = read(output->fd, data_room(), most);
	if (got > 0) {
		data_commit(output->type, (size_t)got);
		output->credit -= (uint32_t)got;
		output->rest -= process.exited ? (uint32_t)got : 0;
		return 1;
	}
	if (got < 0 && (errno == EINTR || errno == EAGAIN))
		return 0;
	end_output(output); /* EIO: nobody has the terminal any more */
	return 0;
}

/* @param flags WNOHANG, or 0 for a process that is being killed */
static void note_exit(int flags)
{
	int status;

	if (process.exited || waitpid(process.pid, &status, flags) != process.pid)
		return;
	process.exited = 1;
	for (int i = 0; i < 2; i++) {
		int rest = TERMINAL_REST;

		if (!process.terminal && (process.output[i].fd < 0 || ioctl(process.output[i].fd, FIONREAD, &rest) < 0))
			rest = 0;
		process.output[i].rest = (uint32_t)rest;
	}
	close_input();
	begin(EXIT);
	put_u32(WIFEXITED(status) ? (uint32_t)WEXITSTATUS(status) : 0);
	put_u32(WIFSIGNALED(status) ? (uint32_t)WTERMSIG(status) : 0);
	end();
}

/* Ends the process group, politely first. */
static void terminate(void)
{
	struct timespec grace = { GRACE_SECONDS, 0 };
	siginfo_t info = { 0 };
	sigset_t child;

	if (process.exited)
		return;
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	kill(-process.pid, SIGTERM);
	if (process.terminal)
		kill(-process.pid, SIGHUP); /* interactive shells ignore SIGTERM */
	kill(-process.pid, SIGCONT);
	if (waitid(P_PID, (id_t)process.pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0)
		sigtimedwait(&child, 0, &grace);
	/* Not reaped yet: the number of the group cannot be another's. */
	kill(-process.pid, SIGKILL);
	note_exit(0);
}

/* The client is gone. */
static void abandon(void)
{
	if (!process.detached)
		terminate();
}

/* Reads what nobody wants until everybody has closed it, so that no background process is stopped by it. */
static void discard_rest(void)
{
	static unsigned char nowhere[4096];

	for (;;) {
		struct pollfd fds[2];
		int open = 0;

		for (int i = 0; i < 2; i++) {
			fds[i] = (struct pollfd){ .fd = process.discard[i], .events = POLLIN };
			open += process.discard[i] >= 0;
		}
		if (!open)
			return;
		poll(fds, 2, -1);
		for (int i = 0; i < 2; i++)
			if (fds[i].revents && read(fds[i].fd, nowhere, sizeof nowhere) <= 0) {
				close(fds[i].fd);
				process.discard[i] = -1;
			}
	}
}

/* Waits until something can be done. */
static void wait_for_events(int quick)
{
	struct pollfd fds[4] = {
		{ .fd = connection_fd(), .events = (short)(POLLIN | (unsent() ? POLLOUT : 0)) },
		{ .fd = -1, .events = input_start < input_end || process.input_ended ? POLLOUT : 0 },
		{ .fd = -1, .events = POLLIN },
		{ .fd = -1, .events = POLLIN },
	};
	struct timespec timeout = { 0, process.exited ? TERMINAL_QUIET * 1000000 : 0 };
	sigset_t none;
	int ready;

	/* Of a pipe this tells that its reader closed it; a terminal that is hung up would be told for ever. */
	if (!process.terminal || fds[1].events)
		fds[1].fd = process.input_fd;
	for (int i = 0; i < 2; i++)
		if (process.output[i].fd >= 0 && process.output[i].credit > 0 && !unsent())
			fds[2 + i].fd = process.output[i].fd;
	sigemptyset(&none);
	if (quick)
		timeout.tv_nsec = 0;
	ready = ppoll(fds, 4, quick || (process.exited && process.terminal && fds[2].fd >= 0) ? &timeout : 0, &none);
	if (ready == 0 && !quick)
		process.output[0].rest = 0; /* the terminal is quiet */
	if (process.input_fd >= 0 && (fds[1].revents & (POLLERR | POLLHUP)) && !process.terminal) {
		close_input();
		begin(STDIN_CLOSED);
		end();
	}
}

/* Whether pipes of an exited process are to be read, or ended, at once. */
static int rest_to_read(void)
{
	if (!process.exited || process.terminal)
		return 0;
	for (int i = 0; i < 2; i++)
		if (process.output[i].fd >= 0 && (process.output[i].rest == 0 || process.output[i].credit > 0))
			return 1;
	return 0;
}

static void serve(void)
{
	int more = 0;

	while (!process.exited || process.output[0].fd >= 0 || process.output[1].fd >= 0 || unsent()) {
		wait_for_events(more);
		if (fill() < 0)
			return;
		take_frames();
		if (process.input_fd >= 0)
			write_input();
		give_credit();
		more = 0;
		note_exit(WNOHANG);
		for (int i = 0; i < 2; i++)
			if (process.output[i].fd >= 0 && !unsent() && (process.output[i].credit > 0 || process.exited))
				more |= read_output(&process.output[i]);
		if (send_some() < 0)
			return;
		more = !unsent() && (more || rest_to_read());
	}
}

void operate_exec(const struct frame *request)
{
	struct reader from = read_frame(request);
	uint32_t flags = get_u32(&from), rows = get_u32(&from), columns = get_u32(&from), count;
	char *directory = get_string(&from), *name = get_string(&from);
	struct sigaction action = { .sa_handler = on_child, .sa_flags = SA_NOCLDSTOP };
	struct start start = { .directory = directory };
	struct user user;
	sigset_t child;

	start.arguments = arguments(&from);
	count = get_u32(&from);
	if (find_user(name, &user) < 0)
		fail(named("user", name));
	start.user = &user;
	process.terminal = !!(flags & EXEC_TTY);
	process.detached = !!(flags & EXEC_DETACHED);
	start.environment = environment(&from, count, &user, process.terminal);
	check(&from);
	wait_for_links(start.arguments[0]);

	process.output[0] = (struct output){ .type = STDOUT, .credit = OUTPUT_WINDOW };
	process.output[1] = (struct output){ .type = STDERR, .credit = OUTPUT_WINDOW };
	process.discard[0] = process.discard[1] = -1;
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, 0);
	sigaction(SIGCHLD, &action, 0);
	signal(SIGPIPE, SIG_IGN);
	if (process.terminal)
		open_terminal(&start, rows, columns);
	else
		open_pipes(&start);
	run(&start);
	at_loss(abandon);
	begin(STARTED);
	put_u32((uint32_t)process.pid);
	end();
	send_some();
	serve();
	if (!process.exited) {
		abandon();
		if (!process.detached)
			_exit(1);
		close(connection_fd());
		close_input();
		for (int i = 0; i < 2; i++)
			process.discard[i] = process.output[i].fd;
	} else {
		finish();
	}
	discard_rest();
	_exit(0);
}
