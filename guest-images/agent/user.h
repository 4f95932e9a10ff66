/* Users and groups of /etc/passwd and /etc/group, as the C library would find them, without its name services. */
#pragma once

#include <sys/types.h>

enum { MAX_GROUPS = 64 };

struct user {
	uid_t uid;
	gid_t gid;
	gid_t groups[MAX_GROUPS];
	size_t group_count;
	char name[64], home[256], shell[256];
};

/* NAME, NAME:GROUP, UID or UID:GID, with names and numbers as one likes; "" is this process's own,
 * without groups. -1 with ENOENT when there is no such name. */
int find_user(const char *text, struct user *user);
