import { Timer } from '#dist/machine/fd-events.js';
import type { DeviceReport } from '#dist/machine/messages.js';
import type { UserDeviceServices } from '#dist/machine/user-devices/user-device.js';

/** What a machine is to a user's device, for unit tests: notes what it is told. It has no timers. */
export class RecordingServices implements UserDeviceServices {
  readonly reports: DeviceReport[] = [];
  readonly lines: string[] = [];

  get events(): never {
    throw new Error(`no ${Timer.name} in a unit test`);
  }

  log(_level: string, message: string): void {
    this.lines.push(message);
  }

  guestWarning(message: string): void {
    this.lines.push(message);
  }

  /** As a MessagePort does, it clones. */
  report(report: DeviceReport): void {
    this.reports.push(structuredClone(report));
  }
}
