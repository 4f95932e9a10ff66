#define _GNU_SOURCE
#include "server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "operations.h"

/* What the agent serves at a time; more connections wait in the socket's queue. */
enum { MAX_CONNECTIONS = 64 };
/* Seconds for a client to say what it wants. */
enum { REQUEST_SECONDS = 30 };
/* Milliseconds: the first and the longest pause between attempts, and how long AF_VSOCK may be missing. */
enum { FIRST_PAUSE = 100, LONGEST_PAUSE = 30 * 1000, DRIVER_PATIENCE = 120 * 1000 };

int serves_machine;
int proc_fd = -1;

static pid_t connections[MAX_CONNECTIONS];
static int connection_count;

static void on_child(int signal) { (void)signal; }

/* Other children are orphans that became this process's: see PR_SET_CHILD_SUBREAPER. */
static void reap(void)
{
	pid_t pid;

	while ((pid = waitpid(-1, 0, WNOHANG)) > 0)
		for (int i = 0; i < connection_count; i++)
			if (connections[i] == pid)
				connections[i] = connections[--connection_count];
}

static void say_hello(void)
{
	begin(HELLO);
	put_u32(PROTOCOL_VERSION);
	put_string(AGENT_VERSION);
	end();
}

/* An initramfs may have switched to another root since. */
static void enter_root_of_init(void)
{
	int root = serves_machine ? openat(proc_fd, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;

	if (root < 0)
		return;
	if (fchdir(root) == 0)
		(void)!chroot(".");
	close(root);
}

static void serve(int fd) __attribute__((noreturn));

static void serve(int fd)
{
	struct frame frame;
	struct reader from;
	uint32_t version;

	connection_start(fd);
	say_hello();
	alarm(REQUEST_SECONDS);
	receive(&frame);
	from = read_frame(&frame);
	if (frame.type != HELLO)
		violation();
	version = get_u32(&from);
	if (version != PROTOCOL_VERSION && !from.bad)
		fail_with(EPROTONOSUPPORT, "protocol version");
	(void)get_string(&from);
	check(&from);
	if (!next_frame(&frame)) {
		/* A client that has something to say of this moment waits for the hello. */
		flush();
		receive(&frame);
	}
	alarm(0);
	enter_root_of_init();
	switch (frame.type) {
	case EXEC: operate_exec(&frame);
	case READ: operate_read(&frame);
	case WRITE: operate_write(&frame);
	case LIST: operate_list(&frame);
	case STAT: operate_stat(&frame);
	case MKDIR: operate_mkdir(&frame);
	case REMOVE: operate_remove(&frame);
	case PACK: operate_pack(&frame);
	case UNPACK: operate_unpack(&frame);
	case PING: succeed();
	case SHUTDOWN: operate_shutdown(&frame);
	case SET_TIME: operate_set_time(&frame);
	case RENEW: operate_renew(&frame);
	default: violation();
	}
}

/* Any process of the guest can reach a listening vsock; only the host may ask for anything. */
static int is_host(int fd)
{
	struct sockaddr_vm peer;
	socklen_t size = sizeof peer;

	if (!serves_machine)
		return 1;
	return getpeername(fd, (struct sockaddr *)&peer, &size) == 0 && peer.svm_cid == HOST_CID;
}

static void accept_connection(int listener, int greeting)
{
	int fd = accept4(listener, 0, 0, SOCK_CLOEXEC);
	pid_t pid;

	if (fd < 0)
		return;
	pid = is_host(fd) ? fork() : -1;
	if (pid == 0) {
		sigset_t none;

		close(listener);
		if (greeting >= 0)
			close(greeting);
		signal(SIGCHLD, SIG_DFL);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, 0);
		serve(fd);
	}
	if (pid > 0)
		connections[connection_count++] = pid;
	close(fd);
}

static int vsock(void) { return socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

/* The driver may be a module that is loaded late. */
static int listen_on_vsock(void)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = AGENT_PORT };
	long pause = FIRST_PAUSE, waited = 0;

	for (;;) {
		int fd = vsock();

		if (fd >= 0) {
			if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, MAX_CONNECTIONS) == 0)
				return fd;
			close(fd);
			return -1;
		}
		if (waited > DRIVER_PATIENCE)
			return -1;
		poll(0, 0, (int)pause);
		waited += pause;
		pause += pause / 2;
	}
}

/* The greeting: a connection to the host that says the agent is there, and stays open for as long as both are. From a
 * privileged port, so that the host knows it from other programs of the guest. */
static int greet(void)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
	int fd = vsock(), bound = -1;

	if (fd < 0)
		return -1;
	/* A port may be taken by a greeting whose end is under way. */
	for (unsigned port = AGENT_PORT - 1; bound < 0 && port > AGENT_PORT - 16; port--) {
		address.svm_port = port;
		bound = bind(fd, (struct sockaddr *)&address, sizeof address);
	}
	address.svm_cid = HOST_CID;
	address.svm_port = AGENT_PORT;
	if (bound == 0 && (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 || errno == EINPROGRESS))
		return fd;
	close(fd);
	return -1;
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

void serve_connections(int listener)
{
	struct sigaction action = { .sa_handler = on_child };
	long pause = FIRST_PAUSE, next = 0; /* when to greet again */
	int greeting = -1, greeted = 0;
	sigset_t child, none;

	if (listener < 0 && (listener = listen_on_vsock()) < 0)
		return;
	fcntl(listener, F_SETFL, O_NONBLOCK);
	sigemptyset(&none);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, 0);
	sigaction(SIGCHLD, &action, 0);
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (;;) {
		struct pollfd fds[2] = { { .fd = -1, .events = POLLIN }, { .fd = -1 } };
		struct timespec timeout;
		long wait = -1;

		if (serves_machine && greeting < 0) {
			wait = next - now();
			if (wait <= 0) {
				greeting = greet();
				greeted = 0;
				wait = pause;
				next = now() + pause;
				pause = 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE;
			}
		}
		if (connection_count < MAX_CONNECTIONS)
			fds[0].fd = listener;
		fds[1].fd = greeting;
		fds[1].events = greeted ? POLLIN : POLLOUT;
		timeout = (struct timespec){ wait / 1000, wait % 1000 * 1000000 };
		ppoll(fds, 2, greeting < 0 && wait >= 0 ? &timeout : 0, &none);
		reap();
		if (fds[0].revents)
			accept_connection(listener, greeting);
		if (!fds[1].revents)
			continue;
		if (!greeted && !(fds[1].revents & (POLLERR | POLLHUP))) {
			connection_start(greeting);
			say_hello();
			if (send_some() == 0 && unsent() == 0) {
				greeted = 1;
				pause = FIRST_PAUSE;
				continue;
			}
		}
		/* The host says nothing here: it is gone. */
		close(greeting);
		greeting = -1;
		next = now() + pause;
	}
}
