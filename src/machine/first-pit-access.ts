import { ByteDevice } from '../devices/byte-device.js';
import type { PortB } from '../devices/i8042.js';
import {
  kvm_pit_channel_state as channelState,
  KVM_PIT_FLAGS_SPEAKER_DATA_ON,
  kvm_pit_state2 as pitState,
} from '../kvm/generated/abi.js';
import type { VmFd } from '../kvm/vm.js';

/** The control word's register, and its bits (Intel 8254 data sheet, "Control Word Format" and "Read-Back Command"). */
const CONTROL = 3;
const READ_BACK = 3;
const NOT_THE_STATUS = 0x10;
/** Of a channel that was never programmed: KVM has mode 0xff then. */
const STATUS = 0xfe;

/**
 * Makes KVM's i8254, which is also at port 0x61, when the guest first touches it: Linux on a TSC deadline timer never
 * does, and KVM takes 13 ms or more to undo a VM with one. KVM answers to these ports from then on. What that first
 * access comes to is part of the state that KVM begins with, as its own i8254 (arch/x86/kvm/i8254.c) would have done it.
 */
export class FirstPitAccess extends ByteDevice {
  readonly name = 'pit';
  readonly portB: PortB;
  readonly #vm: VmFd;

  constructor(vm: VmFd) {
    super();
    this.#vm = vm;
    this.portB = {
      // Gate, output and speaker are off; the refresh clock has just begun.
      read: () => this.#create(() => {}),
      write: (value) => {
        this.#create((state, channel) => {
          channel(2)[channelState.gate] = value & 1;
          state[pitState.flags] = value & KVM_PIT_FLAGS_SPEAKER_DATA_ON; // the bit is the same
        });
      },
    };
  }

  /** The low byte of a counter that has just begun at 65536; and nothing of the control word, which cannot be read. */
  override readByte(): number {
    return this.#create(() => {});
  }

  override writeByte(offset: number, value: number): void {
    this.#create((_, channel) => {
      if (offset !== CONTROL) setCount(channel(offset), value);
      else if (value >> 6 === READ_BACK) readBack(channel, value);
      else setMode(channel(value >> 6), value);
    });
  }

  /** @param change does the access. @returns 0 */
  #create(change: (state: Uint8Array, channel: (number: number) => Uint8Array) => void): number {
    // A wide access is several, of which KVM takes the first byte alone; and two vCPUs at once have no order anyway.
    if (this.#vm.hasPit) return 0;
    this.#vm.createPit2();
    const state = this.#vm.getPit();
    change(state, (number) => {
      const start = pitState.channels + number * channelState.sizeof;
      return state.subarray(start, start + channelState.sizeof);
    });
    this.#vm.setPit(state);
    return 0;
  }
}

/** Of a channel without a mode KVM takes the low byte alone; 0 is 65536. */
function setCount(channel: Uint8Array, value: number): void {
  new DataView(channel.buffer, channel.byteOffset).setUint32(channelState.count, value || 0x1_0000, true);
}

function setMode(channel: Uint8Array, value: number): void {
  const access = (value >> 4) & 3;
  if (access === 0) return; // latches the count, of a channel without a mode nothing
  const mode = (value >> 1) & 7;
  channel[channelState.rw_mode] = channel[channelState.read_state] = channel[channelState.write_state] = access;
  channel[channelState.mode] = mode > 5 ? mode - 4 : mode;
  channel[channelState.bcd] = value & 1;
}

function readBack(channel: (number: number) => Uint8Array, value: number): void {
  if (value & NOT_THE_STATUS) return;
  for (let number = 0; number < 3; number++) {
    if (!(value & (2 << number))) continue;
    channel(number)[channelState.status] = STATUS;
    channel(number)[channelState.status_latched] = 1;
  }
}
