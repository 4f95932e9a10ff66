/** Why a machine ended. */
export type EndReason =
  | 'guest-shutdown' // the guest powered itself off
  | 'guest-exit' // the guest wrote its exit code to the debug-exit port
  | 'guest-reset' // the guest reset itself and onReset is `end`
  | 'guest-panic' // the guest's kernel panicked
  | 'drive-failure' // the host could not serve a drive whose onError is `end`
  | 'page-source-failure' // the source of a restored guest's memory failed
  | 'triple-fault' // the guest's CPU shut down
  | 'guest-instruction' // the guest executed what nothing here can complete
  | 'kvm-failure' // KVM refused to go on
  | 'migrated' // it goes on in another process
  | 'stopped'; // the host stopped it

/** How a machine ended. */
export interface MachineEnd {
  readonly reason: EndReason;
  /** The guest's exit code for `guest-exit`; 0 for `guest-shutdown`; null otherwise. */
  readonly code: number | null;
  /** One line for a person. */
  readonly message: string;
}

/** Times are milliseconds on the host's monotonic clock (see now()). */
export interface MachineStats {
  readonly phases: {
    readonly vmCreated?: number;
    readonly kernelLoaded?: number;
    readonly firstEntry?: number;
    readonly firstSerialByte?: number;
  };
  /** What the guest stamped on the boot-timer port. */
  readonly milestones: Readonly<Record<string, number>>;
  /** Exits that reached the machine thread, by KVM's name in lower case. */
  readonly exits: Readonly<Record<string, number>>;
  /** What the nested-KVM assist did, by kind. */
  readonly assists: Readonly<Record<string, number>>;
  /**
   * What each virtio device counts since its guest's last power-on: notifications, what it found without one (`polled`),
   * interrupts, and of its own.
   */
  readonly devices: Readonly<Record<string, Readonly<Record<string, number>>>>;
}

/** Milliseconds on CLOCK_MONOTONIC: the same for every thread of this process. */
export function now(): number {
  const [seconds, nanoseconds] = process.hrtime();
  return seconds * 1e3 + nanoseconds / 1e6;
}
