/* tsvisor's guest agent: runs commands and moves files for the host, see docs/agent-protocol.md.
 *
 * Started in one of three ways: as a service of the guest's init; as PID 1 by a kernel with rdinit=, then it goes on as
 * the init that would have run (init.c); or with a listening socket as descriptor 3 (LISTEN_FDS=1, sd_listen_fds(3)),
 * which is how tests run it, and then it neither stops the machine nor changes what it is. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "init.h"
#include "operations.h"
#include "server.h"

int main(int argc, char **argv)
{
	const char *listen_fds = getenv("LISTEN_FDS");

	(void)argc;
	if (getpid() == 1) {
		become_init(argv);
		return 1;
	}
	if (listen_fds && strcmp(listen_fds, "1") == 0) {
		fcntl(3, F_SETFD, FD_CLOEXEC);
		serve_connections(3);
		return 1;
	}
	proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	serves_machine = 1;
	serve_connections(-1);
	return 1;
}
