import { UsageError } from '../errors.js';

/** Where a target listens. */
export type Address =
  | { readonly kind: 'tcp'; readonly host: string; readonly port: number }
  | { readonly kind: 'unix'; readonly path: string };

/** Bytes of a Unix socket's path (struct sockaddr_un); Node cuts longer ones. */
const MAX_SOCKET_PATH = 107;

/** @throws UsageError */
export function parseAddress(text: string): Address {
  if (typeof text !== 'string') throw new UsageError('address: must be text, tcp:HOST:PORT or unix:PATH');
  const tcp = /^tcp:(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  if (tcp) {
    const port = Number(tcp[3]);
    if (port <= 65535) return { kind: 'tcp', host: (tcp[1] ?? tcp[2]) as string, port };
  }
  const path = /^unix:([^\0]+)$/.exec(text)?.[1];
  if (path === undefined) throw new UsageError(`address: '${text}' is neither tcp:HOST:PORT nor unix:PATH`);
  if (Buffer.byteLength(path) > MAX_SOCKET_PATH) {
    throw new UsageError(`address: ${path} is longer than the ${MAX_SOCKET_PATH} bytes of a Unix socket's path`);
  }
  return { kind: 'unix', path };
}

/** The reverse of parseAddress(). */
export function formatAddress(address: Address): string {
  if (address.kind === 'unix') return `unix:${address.path}`;
  const { host, port } = address;
  return `tcp:${host.includes(':') ? `[${host}]` : host}:${port}`;
}
