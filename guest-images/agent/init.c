#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "operations.h"
#include "server.h"
#include "text.h"

#define AGENT_PATH "/.tsvisor-agent"
/* Where the root file system is mounted before it is moved to /. */
#define NEW_ROOT "/root"

/* Milliseconds that the root device may take to appear. */
enum { DEVICE_PATIENCE = 30 * 1000, DEVICE_STEP = 50 };

/* Words of the kernel's command line; the last of a kind counts. */
static struct {
	const char *rdinit, *init, *root, *root_type, *root_flags;
	int read_write;
} words;

static void say(const char *what, const char *which)
{
	static char line[512];

	line[0] = 0;
	append(line, sizeof line, "tsvisor-agent: ");
	append(line, sizeof line, what);
	append(line, sizeof line, which);
	append(line, sizeof line, "\n");
	(void)!write(2, line, strlen(line));
}

/* A /proc of the agent's own, in nobody's way: the mount stays while the descriptor does. */
static void open_proc(void)
{
	int made = mkdir("/proc", 0555) == 0;

	if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, 0) == 0) {
		proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		umount2("/proc", MNT_DETACH);
	}
	if (made)
		rmdir("/proc");
}

static const char *after(const char *word, const char *prefix)
{
	size_t size = strlen(prefix);

	return strncmp(word, prefix, size) == 0 ? word + size : 0;
}

static void read_words(void)
{
	static char line[4096];
	const char *value;

	read_text(proc_fd, "cmdline", line, sizeof line);
	for (char *word = strtok(line, " \n"); word && strcmp(word, "--") != 0; word = strtok(0, " \n")) {
		if ((value = after(word, "rdinit="))) {
			if (strcmp(value, AGENT_PATH) != 0)
				words.rdinit = value;
		} else if ((value = after(word, "init="))) {
			words.init = value;
		} else if ((value = after(word, "root="))) {
			words.root = value;
		} else if ((value = after(word, "rootfstype="))) {
			words.root_type = value;
		} else if ((value = after(word, "rootflags="))) {
			words.root_flags = value;
		} else if (strcmp(word, "rw") == 0 || strcmp(word, "ro") == 0) {
			words.read_write = word[1] == 'w';
		}
	}
}

/* The path of the root's device: /dev/NAME, or MAJOR:MINOR, for which a node is made. */
static const char *root_device(void)
{
	const char *at = words.root;
	unsigned long major = read_number(&at, 10), minor;

	if (words.root[0] == '/')
		return words.root;
	if (at++ == words.root || at[-1] != ':')
		return 0;
	minor = read_number(&at, 10);
	mknod("/dev/root", S_IFBLK | 0600, makedev(major, minor));
	return "/dev/root";
}

static int mount_root_as(const char *device, const char *type)
{
	unsigned long flags = words.read_write ? 0 : MS_RDONLY;

	if (mount(device, NEW_ROOT, type, flags, words.root_flags) == 0)
		return 1;
	return (errno == EACCES || errno == EROFS) &&
	       mount(device, NEW_ROOT, type, flags | MS_RDONLY, words.root_flags) == 0;
}

static int try_types(const char *device)
{
	static char types[4096];
	int mounted = 0;

	if (words.root_type) {
		strncpy(types, words.root_type, sizeof types - 1);
		for (char *type = strtok(types, ","); type && !mounted; type = strtok(0, ","))
			mounted = mount_root_as(device, type);
		return mounted;
	}
	/* A tab stands before each type that needs no device's name. */
	read_text(proc_fd, "filesystems", types, sizeof types);
	for (char *line = strtok(types, "\n"); line && !mounted; line = strtok(0, "\n"))
		mounted = line[0] == '\t' && mount_root_as(device, line + 1);
	return mounted;
}

/* Mounts root= and makes it /, as the kernel does without an initramfs. */
static int enter_root(void)
{
	const char *device;
	struct stat st;
	int waited = 0;

	mkdir("/dev", 0755);
	mkdir(NEW_ROOT, 0700);
	mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
	device = root_device();
	if (!device) {
		say("root= must be /dev/NAME or MAJOR:MINOR without an initramfs of yours, not ", words.root);
		return 0;
	}
	for (; stat(device, &st) < 0 && waited < DEVICE_PATIENCE; waited += DEVICE_STEP)
		poll(0, 0, DEVICE_STEP);
	if (!try_types(device)) {
		say("cannot mount the root file system on ", words.root);
		return 0;
	}
	mount("devtmpfs", NEW_ROOT "/dev", "devtmpfs", 0, 0);
	return chdir(NEW_ROOT) == 0 && mount(".", "/", 0, MS_MOVE, 0) == 0 && chroot(".") == 0 && chdir("/") == 0;
}

static void start_agent(char **argv)
{
	if (fork() != 0)
		return;
	setsid();
	/* systemd's switch from initramfs to root spares a process whose name starts so (ROOT_STORAGE_DAEMONS). */
	argv[0][0] = '@';
	prctl(PR_SET_NAME, "tsvisor-agent");
	serves_machine = 1;
	serve_connections(-1);
	_exit(1);
}

static void execute(const char *path, char **argv)
{
	argv[0] = (char *)path;
	execv(path, argv);
}

void become_init(char **argv)
{
	static const char *const usual[] = { "/sbin/init", "/etc/init", "/bin/init", "/bin/sh" };
	const char *first;

	open_proc();
	read_words();
	unlink(AGENT_PATH);
	first = words.rdinit ? words.rdinit : "/init";
	if (access(first, F_OK) < 0) {
		first = 0;
		if (words.root && !enter_root())
			return;
	}
	start_agent(argv);
	if (first)
		execute(first, argv);
	if (words.init) {
		execute(words.init, argv);
		say("cannot execute init=", words.init);
		return;
	}
	for (unsigned i = 0; i < sizeof usual / sizeof *usual; i++)
		execute(usual[i], argv);
	say("no init found", "");
}
