import { constants } from 'node:fs';
import { createRequire } from 'node:module';
import { constants as os } from 'node:os';
import type koffi from 'koffi';
import { errnoName, NetworkError } from '../../errors.js';
import * as abi from '../../virtio/generated/virtio.js';
import { HEADER_SIZE } from '../../virtio/net/header.js';

const { EACCES, EBUSY, EINVAL, ENODEV, ENOENT, ENXIO, EPERM } = os.errno;
const DEVICE = '/dev/net/tun';

/** The C functions that the addon has not. They return -errno where they fail. */
type Libc = ReturnType<typeof loadLibc>;

/** The library that calls them is loaded with the first tap: nothing else here needs it. */
function loadLibc() {
  const ffi: typeof koffi = createRequire(import.meta.url)('koffi');
  const process = ffi.load(null);
  const wrap = (prototype: string) => {
    const call = process.func(prototype);
    return (...args: (number | string | Uint8Array)[]): number => {
      const result: number = call(...args);
      return result < 0 ? -ffi.errno() : result;
    };
  };
  return {
    open: wrap('int open(const char *path, int flags)'),
    socket: wrap('int socket(int domain, int type, int protocol)'),
    close: wrap('int close(int fd)'),
    /** For requests that take a structure. */
    ioctl: wrap('int ioctl(int fd, unsigned long request, _Inout_ uint8_t *argument)'),
    /** For requests that take their argument by value. */
    ioctlValue: wrap('int ioctl(int fd, unsigned long request, unsigned long argument)'),
  };
}

let libc: Libc | undefined;

/** A tap's descriptor, non-blocking and not inherited, and the MTU that it had then. */
export interface OpenTap {
  readonly fd: number;
  readonly mtu: number;
}

/**
 * Attaches to the tap of that name, which reads and writes frames with a virtio_net_hdr_v1 from then on. One that does not
 * exist is made, brought up, and gone when its descriptor is closed. @throws NetworkError
 */
export function openTap(name: string): OpenTap {
  libc ??= loadLibc();
  const fd = libc.open(DEVICE, constants.O_RDWR | constants.O_NONBLOCK | abi.O_CLOEXEC);
  if (fd < 0) throw cannotOpen(name, -fd);
  const socket = libc.socket(abi.AF_INET, abi.SOCK_DGRAM | abi.SOCK_CLOEXEC, 0);
  try {
    check(name, 'socket', socket);
    const request = new Uint8Array(abi.ifreq.sizeof);
    const fields = new DataView(request.buffer);
    new TextEncoder().encodeInto(name, request.subarray(0, abi.IFNAMSIZ - 1));
    const existed = libc.ioctl(socket, abi.SIOCGIFFLAGS, request) === 0;

    fields.setUint16(abi.ifreq.flags, abi.IFF_TAP | abi.IFF_NO_PI | abi.IFF_VNET_HDR, true);
    const attached = libc.ioctl(fd, abi.TUNSETIFF, request);
    if (attached < 0) throw cannotAttach(name, -attached, existed);
    const headerSize = new Uint8Array(new Int32Array([HEADER_SIZE]).buffer);
    check(name, 'TUNSETVNETHDRSZ', libc.ioctl(fd, abi.TUNSETVNETHDRSZ, headerSize));
    if (!existed) {
      check(name, 'SIOCGIFFLAGS', libc.ioctl(socket, abi.SIOCGIFFLAGS, request));
      fields.setUint16(abi.ifreq.flags, fields.getUint16(abi.ifreq.flags, true) | abi.IFF_UP, true);
      check(name, 'SIOCSIFFLAGS', libc.ioctl(socket, abi.SIOCSIFFLAGS, request));
    }
    check(name, 'SIOCGIFMTU', libc.ioctl(socket, abi.SIOCGIFMTU, request));
    return { fd, mtu: fields.getInt32(abi.ifreq.mtu, true) };
  } catch (error) {
    libc.close(fd);
    throw error;
  } finally {
    libc.close(socket);
  }
}

/** Says which frames the kernel may leave unfinished for this tap's reader. @param offloads TUN_F_ bits. */
export function setTapOffloads(fd: number, offloads: number): void {
  libc?.ioctlValue(fd, abi.TUNSETOFFLOAD, offloads);
}

function check(name: string, call: string, result: number): void {
  if (result < 0) throw new NetworkError(`tap ${name}: ${call} failed with ${errnoName(-result)}`);
}

function cannotOpen(name: string, errno: number): NetworkError {
  if (errno === ENOENT || errno === ENODEV || errno === ENXIO) {
    return new NetworkError(`tap ${name}: this host has no ${DEVICE}; load the kernel module with: sudo modprobe tun`);
  }
  if (errno === EACCES || errno === EPERM) {
    return new NetworkError(
      `tap ${name}: this user may not open ${DEVICE}; allow it with: sudo chmod 0666 ${DEVICE}, or use --net user`,
    );
  }
  return new NetworkError(`tap ${name}: cannot open ${DEVICE}: ${errnoName(errno)}`);
}

function cannotAttach(name: string, errno: number, existed: boolean): NetworkError {
  const remedy = `sudo ip tuntap add dev ${name} mode tap user $USER`;
  if (errno === EPERM && existed) {
    return new NetworkError(
      `tap ${name}: it belongs to another user; make one of your own with: ${remedy} (after ip link del ${name}), or run with CAP_NET_ADMIN`,
    );
  }
  if (errno === EPERM) {
    return new NetworkError(
      `tap ${name}: there is none, and this user may not make it; make it with: ${remedy}, or run with CAP_NET_ADMIN`,
    );
  }
  if (errno === EBUSY) return new NetworkError(`tap ${name}: another program uses it; give each machine its own`);
  if (errno === EINVAL && existed) {
    return new NetworkError(
      `tap ${name}: the network interface of that name is not a tap for one queue; choose another name, or make it with: ${remedy}`,
    );
  }
  if (errno === EINVAL) return new NetworkError(`tap ${name}: that cannot be the name of a network interface`);
  return new NetworkError(`tap ${name}: TUNSETIFF failed with ${errnoName(errno)}`);
}
