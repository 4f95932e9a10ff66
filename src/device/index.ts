/**
 * Devices of one's own. A module whose export extends VirtioDevice or MmioDevice is named in the
 * `devices` of a machine's configuration; docs/devices.md says how.
 *
 * @module tsvisor/device
 */

export { GuestMemory, GuestMemoryRangeError, type MemoryRegion } from '../memory/guest-memory.js';
export type { Channel, Device, DeviceHost, DeviceInit, LogLevel, Timer } from './device.js';
export { type Interrupt, MmioDevice, type MmioDeviceHost, type MmioDeviceInit } from './mmio-device.js';
export {
  type Buffers,
  type Chain,
  feature,
  type Queue,
  VirtioDevice,
  type VirtioDeviceHost,
  type VirtioDeviceInit,
  type WritableBuffers,
} from './virtio-device.js';
