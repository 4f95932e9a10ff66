/* The agent as PID 1, in front of another init. */
#pragma once

/* Starts the agent as a process of its own, then becomes the init that the kernel would have run without rdinit= of
 * ours. Returns, with the reason on the console, only when there is none: the kernel then panics, as it would. */
void become_init(char **argv);
