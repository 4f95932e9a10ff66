/* PACK and UNPACK: a tree of files as a stream of entries. A folder's entry is followed by what is in it and a LEAVE, a
 * file's by its DATA, the last of them empty. Names are single components, so there is nowhere else to go. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "operations.h"
#include "text.h"

/* What errors are about: the path of the tree's root, then names. */
static char where[PATH_MAX];

static void pack(int folder, const char *name, const char *sent_name, int depth);

static void pack_file(int fd)
{
	ssize_t got;

	do {
		got = read(fd, data_room(), MAX_DATA);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			fail(where);
		data_commit(DATA, (size_t)got);
	} while (got != 0);
}

static void pack_folder(int fd, int depth)
{
	struct folder folder = { .fd = fd };
	const char *name;

	if (depth == MAX_DEPTH)
		fail_with(ELOOP, where);
	while ((name = next_name(&folder)))
		pack(fd, name, name, depth + 1);
	if (errno)
		fail(where);
	close(fd);
	begin(LEAVE);
	end();
}

static void pack(int folder, const char *name, const char *sent_name, int depth)
{
	static char target[PATH_MAX];
	size_t length = strlen(where);
	struct stat st;
	ssize_t size = 0;
	int fd = -1;

	if (depth > 0 && (!append(where, sizeof where, "/") || !append(where, sizeof where, name)))
		fail_with(ENAMETOOLONG, where);
	/* Only the root is followed if it is a link. */
	if (fstatat(folder, name, &st, depth > 0 ? AT_SYMLINK_NOFOLLOW : 0) < 0) {
		if (depth == 0 || errno != ENOENT)
			fail(where);
		goto done;
	}
	if (S_ISDIR(st.st_mode) || S_ISREG(st.st_mode)) {
		fd = openat(folder, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (depth > 0 ? O_NOFOLLOW : 0));
		if (fd < 0 || fstat(fd, &st) < 0)
			fail(where);
	}
	if (S_ISLNK(st.st_mode) && (size = readlinkat(folder, name, target, sizeof target - 1)) < 0)
		fail(where);
	target[size] = 0;
	/* Devices, sockets and FIFOs are told, too: the client counts what it leaves out. */
	put_entry(&st, sent_name, target);
	if (S_ISDIR(st.st_mode)) {
		pack_folder(fd, depth);
	} else if (S_ISREG(st.st_mode)) {
		pack_file(fd);
		close(fd);
	}
done:
	where[length] = 0;
}

void operate_pack(const struct frame *request)
{
	struct reader from = read_frame(request);
	const char *path = get_path(&from);

	check(&from);
	strcpy(where, path);
	pack(AT_FDCWD, where, "", 0);
	begin(END);
	end();
	finish();
	_exit(0);
}

/* The folders that are being filled. */
static struct level {
	int fd;
	mode_t mode;
	struct timespec modified;
	size_t where;
} levels[MAX_DEPTH];
static int depth;

/* A file that is being written has this name until it is complete. */
static char temporary[32];
static int file_fd = -1;

static int parent(void) { return depth > 0 ? levels[depth - 1].fd : AT_FDCWD; }

static void undo(void)
{
	if (file_fd >= 0)
		unlinkat(parent(), temporary, 0);
}

/* A single component, or for the root the path itself. */
static int is_name(const char *name)
{
	size_t size = strlen(name);

	return size > 0 && size <= NAME_MAX && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

struct entry {
	mode_t mode;
	struct timespec modified;
	const char *name, *target;
};

static void set_times(int fd, const char *name, const struct timespec *modified)
{
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, *modified };

	if (name ? utimensat(fd, name, times, AT_SYMLINK_NOFOLLOW) : futimens(fd, times))
		fail(where);
}

static void enter(const struct entry *entry)
{
	struct level *level = &levels[depth];

	if (depth == MAX_DEPTH)
		fail_with(ELOOP, where);
	if (mkdirat(parent(), entry->name, 0700) < 0 && errno != EEXIST)
		fail(where);
	/* The root may be a link to a folder; nothing in it may. */
	level->fd = openat(parent(), entry->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth > 0 ? O_NOFOLLOW : 0));
	if (level->fd < 0)
		fail(where);
	level->mode = entry->mode & 07777;
	level->modified = entry->modified;
	depth++;
}

static void leave(void)
{
	struct level *level = &levels[--depth];

	if (fchmod(level->fd, level->mode) < 0)
		fail(where);
	set_times(level->fd, 0, &level->modified);
	close(level->fd);
	where[level->where] = 0;
}

static void unpack_file(const struct entry *entry)
{
	static char root_folder[PATH_MAX], name[PATH_MAX];
	struct entry file = *entry;
	struct frame frame;
	int folder = parent();

	/* The payload that the name is in goes with the next frame. */
	strcpy(name, entry->name);
	if (depth == 0) {
		/* The root is a file: its folder is entered, so that a temporary name works as elsewhere. */
		char *slash = strrchr(name, '/');

		strcpy(root_folder, name);
		root_folder[slash ? slash + 1 - name : 0] = 0;
		folder = open(slash ? root_folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (folder < 0)
			fail(where);
		levels[0] = (struct level){ .fd = folder };
		depth = 1;
		if (slash)
			memmove(name, slash + 1, strlen(slash + 1) + 1);
	}
	unlinkat(folder, temporary, 0);
	file_fd = openat(folder, temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (file_fd < 0)
		fail(where);
	for (;;) {
		receive(&frame);
		if (frame.type != DATA)
			violation();
		if (frame.length == 0)
			break;
		for (size_t at = 0; at < frame.length;) {
			ssize_t done = write(file_fd, frame.data + at, frame.length - at);

			if (done < 0 && errno != EINTR)
				fail(where);
			at += done > 0 ? (size_t)done : 0;
		}
	}
	if (fchmod(file_fd, file.mode & 07777) < 0)
		fail(where);
	set_times(file_fd, 0, &file.modified);
	if (renameat(folder, temporary, folder, name) < 0)
		fail(where);
	close(file_fd);
	file_fd = -1;
}

static void make_link(const struct entry *entry)
{
	if (unlinkat(parent(), entry->name, 0) < 0 && errno != ENOENT)
		fail(where);
	if (symlinkat(entry->target, parent(), entry->name) < 0)
		fail(where);
	set_times(parent(), entry->name, &entry->modified);
}

/* @return the type of what was made, as of st_mode */
static mode_t unpack_entry(struct reader *from, char *root)
{
	struct entry entry = { .mode = get_u32(from) };
	size_t length = strlen(where);

	(void)get_u32(from); /* uid and gid mean nothing here: what is made belongs to this process's user */
	(void)get_u32(from);
	entry.modified.tv_nsec = (long)get_u32(from);
	entry.modified.tv_sec = (time_t)get_u64(from);
	(void)get_u64(from);
	entry.name = get_string(from);
	entry.target = get_string(from);
	check(from);
	if (entry.modified.tv_nsec > 999999999)
		violation();
	if (depth > 0) {
		if (!is_name(entry.name))
			violation();
		if (!append(where, sizeof where, "/") || !append(where, sizeof where, entry.name))
			fail_with(ENAMETOOLONG, where);
	} else if (entry.name[0]) {
		violation();
	} else {
		entry.name = root;
	}
	if (S_ISDIR(entry.mode)) {
		levels[depth < MAX_DEPTH ? depth : 0].where = length;
		enter(&entry);
		return S_IFDIR;
	}
	if (S_ISREG(entry.mode))
		unpack_file(&entry);
	else if (S_ISLNK(entry.mode) && entry.target[0])
		make_link(&entry);
	else
		violation();
	where[length] = 0;
	return entry.mode & S_IFMT;
}

void operate_unpack(const struct frame *request)
{
	static char root[PATH_MAX];
	struct reader from = read_frame(request);
	const char *path = get_path(&from);
	struct frame frame;
	uint64_t entries = 0;
	int root_depth = 0;

	check(&from);
	strcpy(root, path);
	strcpy(where, path);
	append(temporary, sizeof temporary, ".tsvisor-");
	append_number(temporary, sizeof temporary, (unsigned long)getpid());
	umask(0);
	for (size_t end = strlen(root); end > 1 && root[end - 1] == '/';)
		root[--end] = 0;
	if (make_parents(root, 0755) < 0)
		fail(root);
	at_loss(undo);
	begin(OK);
	end();
	flush();
	for (;;) {
		receive(&frame);
		from = read_frame(&frame);
		if (frame.type == END && frame.length == 0 && entries > 0 && depth == root_depth)
			succeed();
		/* There is one root. */
		if (entries > 0 && depth == root_depth)
			violation();
		if (frame.type == LEAVE && frame.length == 0 && depth > 0) {
			leave();
		} else if (frame.type == ENTRY) {
			mode_t type = unpack_entry(&from, root);

			if (entries++ == 0 && type != S_IFDIR)
				root_depth = depth;
		} else {
			violation();
		}
	}
}
