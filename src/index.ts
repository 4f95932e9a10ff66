/**
 * Virtual machines in a Node program. What is public is exported by the files that package.json names, and nowhere else.
 *
 * @module tsvisor
 */

export type { CopyOptions, CopySummary } from './agent/copy.js';
export type { ExecOptions, ExecResult, SpawnOptions } from './agent/exec.js';
export type { FileEntry, FileType } from './agent/file-entry.js';
export type { Abortable, GuestFileSystem } from './agent/file-system.js';
export type { GuestProcess, ProcessExit } from './agent/process.js';
export type { ConsoleSize } from './backends/port-stream.js';
export type { Flow } from './backends/user-network/flow.js';
export type { HostForward } from './backends/user-network/host-forward.js';
export type { VsockListener } from './backends/vsock/listener.js';
export type { VsockStream } from './backends/vsock/stream.js';
export type { Vsock, VsockConnectOptions } from './backends/vsock/vsock.js';
export {
  AgentError,
  DeviceError,
  DriveError,
  type ErrorCode,
  GuestError,
  ImageError,
  KvmError,
  MachineError,
  MemoryError,
  MigrationError,
  NetworkError,
  SnapshotError,
  TsvisorError,
  UsageError,
  VsockError,
} from './errors.js';
export type { MachineConfig } from './machine/config.js';
export type {
  ConsolePortConfig,
  DeviceModule,
  DriveConfig,
  NetworkConfig,
  VsockConfig,
} from './machine/device-config.js';
export type { DeviceEvents, DeviceHandle } from './machine/device-handle.js';
export type { EndReason, MachineEnd, MachineStats } from './machine/end.js';
export {
  Machine,
  type MachineEvents,
  type MachineMetrics,
  type MachineOptions,
  type StopOptions,
} from './machine/machine.js';
export type { ReadyOptions } from './machine/machine-agent.js';
export type { MachineState } from './machine/messages.js';
export { SharedThread } from './machine/shared-thread.js';
export type { MigrateOptions, MigrationCommon, MigrationProgress, MigrationResult } from './migration/options.js';
export type { ReceiveOptions } from './migration/receive.js';
export type { DriveOverride } from './snapshot/disks.js';
export type { PageSource, PageSourceConfig } from './snapshot/page-source.js';
export type { RestoreOptions } from './snapshot/restore.js';
export type { SnapshotInfo, SnapshotOptions } from './snapshot/take.js';
