#include "connection.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Milliseconds that finish() waits for the client's next sign. */
enum { LINGER = 5000 };

static int connection;
static void (*undo)(void);

/* Received bytes are in[in_start..in_end]; bytes to send are out[out_start..out_end]. */
static unsigned char in[HEADER + MAX_PAYLOAD];
static size_t in_start, in_end;
static unsigned char out[2 * (HEADER + MAX_DATA)];
static size_t out_start, out_end, out_frame;

void connection_start(int fd)
{
	connection = fd;
	in_start = in_end = out_start = out_end = 0;
}

int connection_fd(void) { return connection; }

void at_loss(void (*function)(void)) { undo = function; }

static void lost(void) __attribute__((noreturn));

static void lost(void)
{
	if (undo)
		undo();
	_exit(1);
}

int fill(void)
{
	ssize_t got;

	if (in_start > 0) {
		memmove(in, in + in_start, in_end - in_start);
		in_end -= in_start;
		in_start = 0;
	}
	if (in_end == sizeof in)
		return 0;
	got = recv(connection, in + in_end, sizeof in - in_end, MSG_DONTWAIT);
	if (got > 0)
		in_end += (size_t)got;
	else if (got == 0 || (errno != EAGAIN && errno != EINTR))
		return -1;
	return 0;
}

int next_frame(struct frame *frame)
{
	uint32_t length;

	if (in_end - in_start < HEADER)
		return 0;
	memcpy(&length, in + in_start, 4);
	memcpy(&frame->type, in + in_start + 4, 4);
	if (length > MAX_PAYLOAD)
		violation();
	if (in_end - in_start - HEADER < length)
		return 0;
	frame->length = length;
	frame->data = in + in_start + HEADER;
	in_start += HEADER + length;
	return 1;
}

static void wait_for(short events)
{
	struct pollfd wanted = { .fd = connection, .events = events };

	poll(&wanted, 1, -1);
}

void receive(struct frame *frame)
{
	while (!next_frame(frame)) {
		wait_for(POLLIN);
		if (fill() < 0)
			lost();
	}
}

struct reader read_frame(const struct frame *frame)
{
	return (struct reader){ .at = frame->data, .end = frame->data + frame->length };
}

void get_bytes(struct reader *from, void *to, size_t size)
{
	if ((size_t)(from->end - from->at) < size) {
		from->bad = 1;
		memset(to, 0, size);
		return;
	}
	memcpy(to, from->at, size);
	from->at += size;
}

uint32_t get_u32(struct reader *from)
{
	uint32_t value;

	get_bytes(from, &value, sizeof value);
	return value;
}

uint64_t get_u64(struct reader *from)
{
	uint64_t value;

	get_bytes(from, &value, sizeof value);
	return value;
}

char *get_string(struct reader *from)
{
	static char empty[1];
	unsigned char *start = from->at;
	unsigned char *zero = memchr(start, 0, (size_t)(from->end - start));

	if (!zero) {
		from->bad = 1;
		empty[0] = 0;
		return empty;
	}
	from->at = zero + 1;
	return (char *)start;
}

char *get_path(struct reader *from)
{
	char *path = get_string(from);
	size_t size = strlen(path);

	if (size > MAX_PATH)
		fail_with(ENAMETOOLONG, "path");
	if (size == 0)
		from->bad = 1;
	return path;
}

void check(const struct reader *from)
{
	if (from->bad || from->at != from->end)
		violation();
}

/* The largest frame but for data: an ENTRY with two names. */
enum { MAX_SMALL = HEADER + 2 * (MAX_PATH + 1) + 64 };

static void make_room(size_t size)
{
	if (sizeof out - out_end < size)
		flush();
}

void begin(enum frame_type type)
{
	uint32_t header[2] = { 0, type };

	make_room(MAX_SMALL);
	out_frame = out_end;
	memcpy(out + out_end, header, HEADER);
	out_end += HEADER;
}

void end(void)
{
	uint32_t length = (uint32_t)(out_end - out_frame - HEADER);

	memcpy(out + out_frame, &length, sizeof length);
}

void put_u32(uint32_t value)
{
	memcpy(out + out_end, &value, sizeof value);
	out_end += sizeof value;
}

void put_u64(uint64_t value)
{
	memcpy(out + out_end, &value, sizeof value);
	out_end += sizeof value;
}

void put_string(const char *text)
{
	size_t size = strnlen(text, MAX_PATH);

	memcpy(out + out_end, text, size);
	out[out_end + size] = 0;
	out_end += size + 1;
}

void put_entry(const struct stat *st, const char *name, const char *target)
{
	begin(ENTRY);
	put_u32(st->st_mode);
	put_u32(st->st_uid);
	put_u32(st->st_gid);
	put_u32((uint32_t)st->st_mtim.tv_nsec);
	put_u64((uint64_t)st->st_mtim.tv_sec);
	put_u64((uint64_t)st->st_size);
	put_string(name);
	put_string(target);
	end();
}

unsigned char *data_room(void)
{
	make_room(HEADER + MAX_DATA);
	return out + out_end + HEADER;
}

void data_commit(enum frame_type type, size_t length)
{
	uint32_t header[2] = { (uint32_t)length, type };

	memcpy(out + out_end, header, HEADER);
	out_end += HEADER + length;
}

size_t unsent(void) { return out_end - out_start; }

int send_some(void)
{
	while (unsent() > 0) {
		ssize_t sent = send(connection, out + out_start, unsent(), MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return errno == EAGAIN ? 0 : -1;
		out_start += (size_t)sent;
	}
	out_start = out_end = 0;
	return 0;
}

void flush(void)
{
	for (;;) {
		if (send_some() < 0)
			lost();
		if (unsent() == 0)
			return;
		wait_for(POLLOUT);
	}
}

void finish(void)
{
	struct pollfd wanted = { .fd = connection, .events = POLLIN };

	flush();
	shutdown(connection, SHUT_WR);
	while (poll(&wanted, 1, LINGER) > 0 && recv(connection, in, sizeof in, MSG_DONTWAIT) > 0)
		;
	close(connection);
}

void fail_with(int error, const char *subject)
{
	begin(ERROR);
	put_u32((uint32_t)error);
	put_string(subject);
	end();
	if (undo)
		undo();
	undo = 0;
	finish();
	_exit(1);
}

void fail(const char *subject) { fail_with(errno, subject); }

void violation(void) { fail_with(EPROTO, "the request breaks the protocol"); }

void succeed(void)
{
	begin(OK);
	end();
	finish();
	_exit(0);
}
