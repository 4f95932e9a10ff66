/* The wire protocol, see docs/agent-protocol.md. src/agent/protocol.ts has the same numbers. */
#pragma once

enum { PROTOCOL_VERSION = 1, AGENT_PORT = 1007, HOST_CID = 2 };

/* Bytes. A request holds at most 128 KiB of arguments and environment, and some paths. */
enum { HEADER = 8, MAX_PAYLOAD = 160 * 1024, MAX_DATA = 32 * 1024, MAX_PATH = 4095, MAX_DEPTH = 256 };

/* Credit for each stream of a process at its start. */
enum { STDIN_WINDOW = 64 * 1024, OUTPUT_WINDOW = 256 * 1024 };

enum frame_type {
	HELLO = 1,
	OK = 2,
	ERROR = 3,
	DATA = 4,
	END = 5,
	ENTRY = 6,
	LEAVE = 7,

	EXEC = 0x10,

	READ = 0x20,
	WRITE,
	LIST,
	STAT,
	MKDIR,
	REMOVE,
	PACK,
	UNPACK,

	PING = 0x30,
	SHUTDOWN,
	SET_TIME,
	RENEW,

	STARTED = 0x40,
	STDIN,
	STDOUT,
	STDERR,
	STDIN_CLOSED,
	CREDIT,
	SIGNAL,
	RESIZE,
	EXIT,
	TERMINATE,
};

/* Flags of requests. */
enum { EXEC_TTY = 1, EXEC_DETACHED = 2 };
enum { STAT_NO_FOLLOW = 1 };
enum { MKDIR_PARENTS = 1 };
enum { REMOVE_RECURSIVE = 1, REMOVE_FORCE = 2 };
enum { WRITE_HAS_MODE = 1 };
enum { RENEW_RANDOM = 1, RENEW_TIME = 2 };

/* Bytes of RENEW's seed. */
enum { SEED_SIZE = 64 };
