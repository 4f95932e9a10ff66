/* What a connection can ask for. Each takes the request's frame and ends the process, which serves one request. */
#pragma once

#include "connection.h"

/* Whether this agent serves the machine it runs on: then it may stop it and change what it is. */
extern int serves_machine;
/* A descriptor of /proc, or -1. */
extern int proc_fd;

#define OPERATION __attribute__((noreturn))
OPERATION void operate_exec(const struct frame *request);
OPERATION void operate_read(const struct frame *request);
OPERATION void operate_write(const struct frame *request);
OPERATION void operate_list(const struct frame *request);
OPERATION void operate_stat(const struct frame *request);
OPERATION void operate_mkdir(const struct frame *request);
OPERATION void operate_remove(const struct frame *request);
OPERATION void operate_pack(const struct frame *request);
OPERATION void operate_unpack(const struct frame *request);
OPERATION void operate_shutdown(const struct frame *request);
OPERATION void operate_set_time(const struct frame *request);
OPERATION void operate_renew(const struct frame *request);

/* mkdir -p, as `mode` for what is made. */
int make_parents(char *path, mode_t mode);
