/** IPv4 addresses are unsigned 32-bit numbers. The network is QEMU's: 10.0.2.0/24. */
export const NETWORK = 0x0a000200;
export const NETMASK = 0xffffff00;
/** The host, and the router. */
export const GATEWAY = NETWORK + 2;
export const DNS_SERVER = NETWORK + 3;
/** What the guest gets by DHCP. */
export const GUEST = NETWORK + 15;
export const NETWORK_BROADCAST = NETWORK + 255;
export const BROADCAST = 0xffffffff;
export const LOOPBACK = 0x7f000001;
export const MTU = 1500;

/** The MAC of every address but the guest's. */
export const NETWORK_MAC = Uint8Array.of(0x52, 0x55, 0x0a, 0x00, 0x02, 0x02);

export function formatAddress(address: number): string {
  return `${address >>> 24}.${(address >>> 16) & 255}.${(address >>> 8) & 255}.${address & 255}`;
}

/** @returns -1 when the text is not four decimal numbers up to 255. */
export function parseAddress(text: string): number {
  const match = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(text);
  if (!match) return -1;
  const bytes = match.slice(1).map(Number);
  if (bytes.some((byte) => byte > 255)) return -1;
  return bytes.reduce((address, byte) => address * 256 + byte, 0);
}

export function inNetwork(address: number): boolean {
  return (address & NETMASK) >>> 0 === NETWORK;
}

/** Whether an address of the network may be a guest's: not the network's own, and not one that is nobody's. */
export function isGuestAddress(address: number): boolean {
  if (!inNetwork(address)) return false;
  return address !== NETWORK && address !== GATEWAY && address !== DNS_SERVER && address !== NETWORK_BROADCAST;
}

export function isBroadcast(address: number): boolean {
  return address === BROADCAST || address === NETWORK_BROADCAST || address >>> 28 === 14;
}

/** Whether a guest may send to it at all: not "this network", loopback or the reserved class E (RFC 6890). */
export function isRoutable(address: number): boolean {
  const first = address >>> 24;
  return first !== 0 && first !== 127 && first < 224;
}

/** Where the host finds what the guest calls `address`: the gateway is the host's loopback, as in QEMU. */
export function hostAddressOf(address: number): number {
  return address === GATEWAY ? LOOPBACK : address;
}

/** The reverse: how the guest knows a peer of a host socket. */
export function guestViewOf(address: number): number {
  return address >>> 24 === 127 ? GATEWAY : address;
}
