#define _GNU_SOURCE
#include "user.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "text.h"

/* What fits of /etc/passwd or /etc/group. */
static char text[256 * 1024];

/* Reads a decimal number that is all of `digits`. */
static int number(const char *digits, unsigned *value)
{
	const char *end = digits;
	unsigned long n = read_number(&end, 10);

	*value = (unsigned)n;
	return end != digits && *end == 0 && n < 0xffffffff;
}

/* The next line, with its zero; null at the end. */
static char *next_line(char **rest)
{
	char *line = *rest;

	if (*line == 0)
		return 0;
	*rest += strcspn(line, "\n");
	if (**rest)
		*(*rest)++ = 0;
	return line;
}

/* Splits a line at its colons; what is missing is "". */
static void split(char *line, char **field, int count)
{
	for (int i = 0; i < count; i++) {
		field[i] = line;
		line += strcspn(line, ":");
		if (*line)
			*line++ = 0;
	}
}

static void copy(char *to, size_t size, const char *text)
{
	if (strlen(text) < size)
		strcpy(to, text);
}

/* The line of /etc/passwd with this name, or when `by_uid` with this uid. */
static int find_passwd(struct user *user, const char *name, int by_uid)
{
	char *rest = text, *line, *field[7];

	read_text(AT_FDCWD, "/etc/passwd", text, sizeof text);
	while ((line = next_line(&rest))) {
		unsigned uid, gid;

		split(line, field, 7);
		if (!number(field[2], &uid) || !number(field[3], &gid))
			continue;
		if (by_uid ? uid != user->uid : strcmp(field[0], name) != 0)
			continue;
		user->uid = uid;
		user->gid = gid;
		copy(user->name, sizeof user->name, field[0]);
		copy(user->home, sizeof user->home, field[5]);
		copy(user->shell, sizeof user->shell, field[6]);
		return 1;
	}
	return 0;
}

static int is_member(const char *members, const char *name)
{
	size_t size = strlen(name);

	while (*members) {
		size_t length = strcspn(members, ",");

		if (length == size && size > 0 && memcmp(members, name, size) == 0)
			return 1;
		members += length + (members[length] == ',');
	}
	return 0;
}

/* The gid of the group `wanted`, unless it is null, and the user's supplementary groups. */
static int find_groups(struct user *user, const char *wanted)
{
	char *rest = text, *line, *field[4];
	int found = 0;

	read_text(AT_FDCWD, "/etc/group", text, sizeof text);
	while ((line = next_line(&rest))) {
		unsigned gid;

		split(line, field, 4);
		if (!number(field[2], &gid))
			continue;
		if (wanted && !found && strcmp(field[0], wanted) == 0) {
			user->gid = gid;
			found = 1;
		}
		if (user->group_count < MAX_GROUPS && is_member(field[3], user->name))
			user->groups[user->group_count++] = gid;
	}
	return found || !wanted;
}

int find_user(const char *text, struct user *user)
{
	char name[64], *group;
	unsigned gid;

	memset(user, 0, sizeof *user);
	copy(user->home, sizeof user->home, "/");
	copy(user->shell, sizeof user->shell, "/bin/sh");
	if (text[0] == 0) {
		user->uid = geteuid();
		user->gid = getegid();
		find_passwd(user, 0, 1);
		user->gid = getegid();
		return 0;
	}
	if (strlen(text) >= sizeof name)
		goto none;
	strcpy(name, text);
	group = strchr(name, ':');
	if (group)
		*group++ = 0;
	if (number(name, &user->uid)) {
		user->gid = user->uid; /* for a uid without a line */
		find_passwd(user, 0, 1);
	} else if (!find_passwd(user, name, 0)) {
		goto none;
	}
	if (group && number(group, &gid)) {
		user->gid = gid;
		group = 0;
	}
	/* The user's own group comes first: setgroups() must keep it. */
	user->groups[0] = user->gid;
	user->group_count = 1;
	if (!find_groups(user, group))
		goto none;
	user->groups[0] = user->gid;
	return 0;
none:
	errno = ENOENT;
	return -1;
}
