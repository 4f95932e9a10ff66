import { createSocket, type Socket } from 'node:dgram';

/** A socket for IPv4 addresses, which are literal: no lookup, and no turn of the event loop for one. */
export function udpSocket(): Socket {
  return createSocket({ type: 'udp4', lookup: literalLookup as never });
}

function literalLookup(
  address: string,
  _options: unknown,
  done: (error: null, address: string, family: number) => void,
): void {
  done(null, address, 4);
}

/** Resolves when the socket is closed, also if it was before. */
export function closeSocket(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    try {
      socket.close(() => resolve());
    } catch {
      resolve(); // it is closed
    }
  });
}
