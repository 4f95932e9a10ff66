/* The frames of one connection: this process serves no other. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#include "protocol.h"

struct frame {
	uint32_t type;
	uint32_t length;
	unsigned char *data;
};

/* What is left of a payload. `bad` once something was read that is not there. */
struct reader {
	unsigned char *at, *end;
	int bad;
};

void connection_start(int fd);
int connection_fd(void);

/* Waits for a frame. Ends the process when the connection ends or breaks the protocol; see at_loss(). */
void receive(struct frame *frame);
/* Takes in what has arrived, without waiting. -1 at the connection's end. */
int fill(void);
/* Whether a whole frame has arrived; it is valid until the next call. */
int next_frame(struct frame *frame);

struct reader read_frame(const struct frame *frame);
void get_bytes(struct reader *from, void *to, size_t size);
uint32_t get_u32(struct reader *from);
uint64_t get_u64(struct reader *from);
/* A string, in place. "" when bad, never null. */
char *get_string(struct reader *from);
/* A path: not empty and not too long. */
char *get_path(struct reader *from);
/* A violation of the protocol unless all was read and nothing was bad. */
void check(const struct reader *from);

void begin(enum frame_type type);
void put_u32(uint32_t value);
void put_u64(uint64_t value);
void put_string(const char *text);
void put_entry(const struct stat *st, const char *name, const char *target);
void end(void);
/* Room for a DATA, STDOUT or STDERR frame's bytes: read up to MAX_DATA there, then commit. */
unsigned char *data_room(void);
void data_commit(enum frame_type type, size_t length);
/* Bytes not sent yet. */
size_t unsent(void);
/* Sends what it can without waiting; -1 at the connection's end. */
int send_some(void);
/* Sends all. */
void flush(void);
/* Sends all and closes, once the client has or some seconds have passed: with something unread left, what was sent could
 * be lost. */
void finish(void);

/* Sends ERROR with errno and exits; `subject` says what it is about, as a path. */
void fail(const char *subject) __attribute__((noreturn));
void fail_with(int error, const char *subject) __attribute__((noreturn));
/* Sends OK and exits. */
void succeed(void) __attribute__((noreturn));
void violation(void) __attribute__((noreturn));
/* Called before the process ends early, to undo what is half done. */
void at_loss(void (*undo)(void));
