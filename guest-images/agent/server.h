/* Accepts connections, and tells the host that the agent is there. */
#pragma once

/* @param listener a listening socket, or -1 to make one on AF_VSOCK. Returns only when there is no AF_VSOCK. */
void serve_connections(int listener);
