/** tsvisor: virtual machines in a Node program. Everything public is exported here and nowhere else. */
export {
  type ErrorCode,
  ImageError,
  KvmError,
  MemoryError,
  TsvisorError,
  UsageError,
} from './errors.js';
export type { MachineConfig } from './machine/config.js';
export type { EndReason, MachineEnd, MachineStats } from './machine/end.js';
export { Machine, type MachineOptions } from './machine/machine.js';
export type { MachineState } from './machine/messages.js';
