import { KvmError, TsvisorError } from '../errors.js';
import { addon, type Bytes, type Mapping } from './addon.js';
import { Cpuid } from './cpuid.js';
import * as abi from './generated/abi.js';
import { VmFd } from './vm.js';

const O_RDWR = 2;
const EACCES = 13;
const EPERM = 1;
const ENOENT = 2;
const ENXIO = 6;
const ENODEV = 19;
/** More than KVM lists: 181 in Linux 6.18. */
const MAX_MSRS = 1024;

/**
 * Issues an ioctl and turns a failure into a KvmError.
 * @param name the ioctl as the KVM API calls it. @param purpose completes "… failed with EINVAL while".
 */
export function kvmIoctl(
  fd: number,
  name: string,
  request: number,
  purpose: string,
  argument?: number | Bytes,
  pointerOffset?: number,
  pointee?: Bytes,
): number {
  let result: number;
  if (pointee !== undefined) result = addon.ioctl(fd, request, argument, pointerOffset, pointee);
  else if (argument !== undefined) result = addon.ioctl(fd, request, argument);
  else result = addon.ioctl(fd, request);
  if (result < 0) throw new KvmError(name, -result, purpose);
  return result;
}

/** Maps memory; the mapping lives until unmap(). @throws KvmError with code ERR_MEMORY. */
export function mapMemory(
  length: number,
  protection: number,
  flags: number,
  fd: number,
  purpose: string,
  offset = 0,
): Mapping {
  try {
    return new addon.Mapping(length, protection, flags, fd, offset);
  } catch (error) {
    throw new KvmError('mmap', (error as { errno?: number }).errno ?? 0, purpose, 'ERR_MEMORY');
  }
}

/** /dev/kvm (KVM API, section 2: the system file descriptor). */
export class Kvm implements Disposable {
  readonly fd: number;
  /** Size in bytes of a vCPU's kvm_run mapping. */
  readonly vcpuMmapSize: number;

  private constructor(fd: number) {
    this.fd = fd;
    const version = kvmIoctl(fd, 'KVM_GET_API_VERSION', abi.KVM_GET_API_VERSION, 'opening KVM');
    if (version !== abi.KVM_API_VERSION) {
      throw new TsvisorError('ERR_KVM_UNSUPPORTED', `KVM API version ${version} is not ${abi.KVM_API_VERSION}`);
    }
    this.vcpuMmapSize = kvmIoctl(fd, 'KVM_GET_VCPU_MMAP_SIZE', abi.KVM_GET_VCPU_MMAP_SIZE, 'opening KVM');
  }

  /** @throws TsvisorError ERR_KVM_MISSING, ERR_KVM_PERMISSION or ERR_KVM_UNSUPPORTED, each with its remedy. */
  static open(path = '/dev/kvm'): Kvm {
    const fd = addon.open(path, O_RDWR);
    if (fd >= 0) {
      try {
        return new Kvm(fd);
      } catch (error) {
        addon.close(fd);
        if (error instanceof KvmError) {
          throw new TsvisorError('ERR_KVM_UNSUPPORTED', `${path} is not a KVM device`, { cause: error });
        }
        throw error;
      }
    }
    if (fd === -EACCES || fd === -EPERM) {
      throw new TsvisorError(
        'ERR_KVM_PERMISSION',
        `${path}: permission denied; add this user to the group that owns it (sudo usermod -aG kvm $USER, then log in again)`,
      );
    }
    if (fd === -ENOENT || fd === -ENXIO || fd === -ENODEV) {
      throw new TsvisorError(
        'ERR_KVM_MISSING',
        `${path} does not exist or has no driver; load one (sudo modprobe kvm_intel or kvm_amd), enable virtualization in the firmware, or in a container pass --device ${path}`,
      );
    }
    throw new KvmError('open', -fd, `opening ${path}`);
  }

  /** The value of a capability; 0 when it is absent (KVM API 4.4). */
  checkExtension(capability: number): number {
    return kvmIoctl(this.fd, 'KVM_CHECK_EXTENSION', abi.KVM_CHECK_EXTENSION, 'asking for a capability', capability);
  }

  /** What CPUID may offer a guest on this host (KVM API 4.46). */
  supportedCpuid(): Cpuid {
    const cpuid = Cpuid.ofCapacity(256);
    kvmIoctl(this.fd, 'KVM_GET_SUPPORTED_CPUID', abi.KVM_GET_SUPPORTED_CPUID, 'reading host CPUID', cpuid.bytes);
    return cpuid;
  }

  /** The model-specific registers that make up a vCPU's state on this host (KVM API 4.3). */
  msrIndices(): number[] {
    const words = new Uint32Array(1 + MAX_MSRS);
    words[0] = MAX_MSRS;
    kvmIoctl(this.fd, 'KVM_GET_MSR_INDEX_LIST', abi.KVM_GET_MSR_INDEX_LIST, 'listing MSRs', words);
    return [...words.subarray(1, 1 + (words[0] as number))];
  }

  /** KVM_CREATE_VM (KVM API 4.2). */
  createVm(): VmFd {
    // EINTR: a signal arrived while the kernel waited for another VM's clean-up.
    for (;;) {
      const fd = addon.ioctl(this.fd, abi.KVM_CREATE_VM, 0);
      if (fd >= 0) return new VmFd(fd, this);
      if (fd !== -4) throw new KvmError('KVM_CREATE_VM', -fd, 'creating a virtual machine');
    }
  }

  close(): void {
    addon.close(this.fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
