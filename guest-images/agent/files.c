/* READ, WRITE, LIST, STAT, MKDIR, REMOVE. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "operations.h"
#include "text.h"

void operate_read(const struct frame *request)
{
	struct reader from = read_frame(request);
	const char *path = get_path(&from);
	struct stat st;
	ssize_t got;
	int fd;

	check(&from);
	/* O_NONBLOCK: a FIFO without a writer is not waited for. */
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0 || fstat(fd, &st) < 0)
		fail(path);
	if (S_ISDIR(st.st_mode))
		fail_with(EISDIR, path);
	while ((got = read(fd, data_room(), MAX_DATA)) != 0) {
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail(path);
		data_commit(DATA, (size_t)got);
		flush();
	}
	begin(END);
	end();
	finish();
	_exit(0);
}

/* What a write makes before it is renamed. */
static char temporary[PATH_MAX];

static void remove_temporary(void) { unlink(temporary); }

static int write_all(int fd, const unsigned char *data, size_t size)
{
	while (size > 0) {
		ssize_t done = write(fd, data, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -1;
		data += done;
		size -= (size_t)done;
	}
	return 0;
}

/* Opens a new file beside `path`, named in `temporary`. */
static int open_temporary(const char *path, mode_t mode)
{
	const char *slash = strrchr(path, '/');

	strcpy(temporary, path);
	temporary[slash ? slash + 1 - path : 0] = 0;
	if (!append(temporary, sizeof temporary, ".tsvisor-") ||
	    !append_number(temporary, sizeof temporary, (unsigned long)getpid())) {
		errno = ENAMETOOLONG;
		return -1;
	}
	unlink(temporary);
	return open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
}

void operate_write(const struct frame *request)
{
	static char target[PATH_MAX];
	struct reader from = read_frame(request);
	uint32_t flags = get_u32(&from), mode = get_u32(&from);
	const char *path = get_path(&from);
	struct stat st;
	struct frame frame;
	int fd, exists, atomic;

	check(&from);
	/* A link's file is replaced, not the link. */
	exists = realpath(path, target) && stat(target, &st) == 0;
	if (!exists)
		strcpy(target, path);
	if (exists && S_ISDIR(st.st_mode))
		fail_with(EISDIR, target);
	umask(0);
	mode &= 07777;
	atomic = !exists || S_ISREG(st.st_mode);
	fd = atomic ? open_temporary(target, 0600) : -1;
	if (fd >= 0) {
		at_loss(remove_temporary);
	} else {
		/* A device, or a file in a folder that takes no new ones, as those of /proc. */
		if (!exists)
			fail(target);
		atomic = 0;
		fd = open(target, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NOCTTY);
		if (fd < 0)
			fail(target);
	}
	begin(OK);
	end();
	flush();
	for (;;) {
		receive(&frame);
		if (frame.type == END && frame.length == 0)
			break;
		if (frame.type != DATA)
			violation();
		if (write_all(fd, frame.data, frame.length) < 0)
			fail(target);
	}
	if (atomic) {
		if (exists)
			(void)!fchown(fd, st.st_uid, st.st_gid);
		if (fchmod(fd, flags & WRITE_HAS_MODE ? mode : exists ? st.st_mode & 07777 : 0644) < 0)
			fail(target);
	} else if ((flags & WRITE_HAS_MODE) && fchmod(fd, mode) < 0) {
		fail(target);
	}
	if (close(fd) < 0 || (atomic && rename(temporary, target) < 0))
		fail(target);
	at_loss(0);
	succeed();
}

static void send_entry(int folder, const char *path, const char *name, int flags)
{
	static char target[PATH_MAX];
	struct stat st;
	ssize_t size = 0;

	if (fstatat(folder, path, &st, flags) < 0) {
		/* A file may go while its folder is listed. */
		if (name[0] && errno == ENOENT)
			return;
		fail(path);
	}
	if (S_ISLNK(st.st_mode) && (size = readlinkat(folder, path, target, sizeof target - 1)) < 0)
		size = 0;
	target[size] = 0;
	put_entry(&st, name, target);
}

void operate_list(const struct frame *request)
{
	struct reader from = read_frame(request);
	const char *path = get_path(&from);
	struct folder folder = { 0 };
	const char *name;

	check(&from);
	folder.fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (folder.fd < 0)
		fail(path);
	while ((name = next_name(&folder)))
		send_entry(folder.fd, name, name, AT_SYMLINK_NOFOLLOW);
	if (errno)
		fail(path);
	begin(END);
	end();
	finish();
	_exit(0);
}

void operate_stat(const struct frame *request)
{
	struct reader from = read_frame(request);
	uint32_t flags = get_u32(&from);
	const char *path = get_path(&from);

	check(&from);
	send_entry(AT_FDCWD, path, "", flags & STAT_NO_FOLLOW ? AT_SYMLINK_NOFOLLOW : 0);
	finish();
	_exit(0);
}

int make_parents(char *path, mode_t mode)
{
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		int failed;

		*slash = 0;
		failed = mkdir(path, mode) < 0 && errno != EEXIST && errno != EROFS;
		*slash = '/';
		if (failed)
			return -1;
	}
	return 0;
}

void operate_mkdir(const struct frame *request)
{
	struct reader from = read_frame(request);
	uint32_t flags = get_u32(&from), mode = get_u32(&from);
	char *path = get_path(&from);
	struct stat st;

	check(&from);
	umask(0);
	if ((flags & MKDIR_PARENTS) && make_parents(path, 0755) < 0)
		fail(path);
	if (mkdir(path, mode & 07777) < 0) {
		int error = errno;

		if (!(flags & MKDIR_PARENTS) || error != EEXIST || stat(path, &st) < 0 || !S_ISDIR(st.st_mode))
			fail_with(error, path);
	}
	succeed();
}

/* Empties a folder and closes it. It never follows a link, and goes no deeper than descriptors allow. -1 with errno. */
static int empty(int fd)
{
	struct folder folder = { .fd = fd };
	const char *name;
	int error = 0;

	/* To remove what was read is safe; what a file system then skips is read anew. */
	for (int removed = 1; removed && !error; lseek(fd, 0, SEEK_SET)) {
		removed = 0;
		while (!error && (name = next_name(&folder))) {
			int inner;

			removed = 1;
			if (unlinkat(fd, name, 0) == 0)
				continue;
			inner = errno == EISDIR || errno == EPERM
					? openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
					: -1;
			if (inner < 0 || empty(inner) < 0 || unlinkat(fd, name, AT_REMOVEDIR) < 0)
				error = errno;
		}
		error = error ? error : errno;
	}
	close(fd);
	errno = error;
	return error ? -1 : 0;
}

void operate_remove(const struct frame *request)
{
	struct reader from = read_frame(request);
	uint32_t flags = get_u32(&from);
	const char *path = get_path(&from);
	struct stat st;

	check(&from);
	if (lstat(path, &st) < 0) {
		if (!(flags & REMOVE_FORCE) || errno != ENOENT)
			fail(path);
	} else if (!S_ISDIR(st.st_mode)) {
		if (unlink(path) < 0)
			fail(path);
	} else {
		int fd = -1;

		if (flags & REMOVE_RECURSIVE) {
			fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			if (fd < 0 || empty(fd) < 0)
				fail(path);
		}
		if (rmdir(path) < 0)
			fail(path);
	}
	succeed();
}
