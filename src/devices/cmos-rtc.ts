import type { StateReader } from '../state-reader.js';
import { ByteDevice } from './byte-device.js';
import { decodeTime, encodeTime, isTimeRegister } from './rtc-time.js';

const INDEX = 0;
const DATA = 1;
const SIZE = 128;

/** Control registers, and their bits that mean something here. */
const A = 0x0a;
const B = 0x0b;
const C = 0x0c;
const D = 0x0d;
const A_UPDATE_IN_PROGRESS = 0x80;
/** DV2 and DV1: the divider chain is held in reset. */
const A_DIVIDER_RESET = 0x60;
const B_SET = 0x80;
const B_UPDATE_INTERRUPT = 0x10;
const C_INTERRUPT = 0x80;
const C_UPDATE_ENDED = 0x10;
const D_VALID = 0x80;

/** UIP precedes an update by 244 µs and lasts for 1984 µs of it (MC146818 datasheet, table 6): the last 2 ms of a second. */
const UPDATE_MS = 2;

/** The first update comes half a second after the divider is released (datasheet, "Divider control"). */
const RELEASED_PHASE_MS = 500;

const KiB = 1024;
const MiB = 1024 * KiB;

export interface CmosOptions {
  /** The time in milliseconds since 1970, UTC. `Date` itself will do. */
  readonly clock: { now(): number };
  /** RAM in bytes below 4 GiB, and above. */
  readonly memoryBelow4GiB: number;
  readonly memoryAbove4GiB?: number | undefined;
}

/** A hundred thousand years. */
const MAX_OFFSET_MS = 3e15;

/** The state of the clock as plain data. The time goes on while a machine is saved. */
export interface CmosState {
  readonly registers: readonly number[];
  readonly index: number;
  readonly offsetMs: number;
  readonly halted: boolean;
  readonly phaseMs: number;
  readonly updateSecond: number;
}

/**
 * The MC146818 real-time clock and its CMOS memory: 128 bytes behind an index port (bit 7 masks NMI and is ignored) and a
 * data port. It runs in UTC from the host's clock; a time that the guest sets is kept as an offset.
 *
 * Alarm, periodic and update-ended interrupts are not delivered, whatever register B enables: register C shows updates
 * only. Alarm registers are memory.
 */
export class CmosRtc extends ByteDevice {
  readonly name = 'cmos-rtc';
  readonly #clock: { now(): number };
  readonly #registers = new Uint8Array(SIZE);
  #index = 0;
  /** The guest's time minus the host's. */
  #offset = 0;
  /** The time registers stand still: SET, or the divider is held in reset. */
  #halted = false;
  /** How far into its second a halted clock is. */
  #phase = 0;
  /** The second that register C was last read in. */
  #updateSecond: number;

  constructor(options: CmosOptions) {
    super();
    this.#clock = options.clock;
    this.#updateSecond = this.#second();
    this.#registers[A] = 0x26; // 32.768 kHz, 1024 Hz
    this.#registers[B] = 0x02; // BCD, 24 hours
    this.#registers[D] = D_VALID;
    this.#registers[0x14] = 0x02; // equipment: a coprocessor
    this.#setMemory(options.memoryBelow4GiB, options.memoryAbove4GiB ?? 0);
  }

  override readByte(offset: number): number {
    if (offset !== DATA) return 0xff; // the index port is for writing only
    const index = this.#index;
    if (isTimeRegister(index) && !this.#halted) encodeTime(this.#time(), this.#format, this.#registers);
    if (index === A) return (this.#registers[A] as number) | (this.#updating() ? A_UPDATE_IN_PROGRESS : 0);
    if (index === C) return this.#readC();
    return this.#registers[index] as number;
  }

  override writeByte(offset: number, value: number): void {
    if (offset === INDEX) this.#index = value & (SIZE - 1);
    else if (offset === DATA) this.#writeRegister(this.#index, value);
  }

  save(): CmosState {
    return {
      registers: Array.from(this.#registers),
      index: this.#index,
      offsetMs: this.#offset,
      halted: this.#halted,
      phaseMs: this.#phase,
      updateSecond: this.#updateSecond,
    };
  }

  restore(state: StateReader): void {
    this.#registers.set(state.numbers('registers', SIZE, 0, 0xff));
    this.#index = state.number('index', 0, SIZE - 1);
    this.#offset = state.number('offsetMs', -MAX_OFFSET_MS, MAX_OFFSET_MS);
    this.#halted = state.boolean('halted');
    this.#phase = state.number('phaseMs', 0, 999);
    this.#updateSecond = state.number('updateSecond', -MAX_OFFSET_MS, MAX_OFFSET_MS);
  }

  get #format(): number {
    return this.#registers[B] as number;
  }

  #writeRegister(index: number, value: number): void {
    if (index === C || index === D) return;
    if (index === A || index === B) {
      this.#control(index, index === A ? value & ~A_UPDATE_IN_PROGRESS : value);
    } else if (isTimeRegister(index) && !this.#halted) {
      this.#halt();
      this.#registers[index] = value;
      this.#resume();
    } else {
      this.#registers[index] = value;
    }
  }

  #control(index: number, value: number): void {
    const a = index === A ? value : (this.#registers[A] as number);
    const b = index === B ? value : (this.#registers[B] as number);
    const dividerReset = (a & A_DIVIDER_RESET) === A_DIVIDER_RESET;
    const halt = dividerReset || (b & B_SET) !== 0;
    if (halt && !this.#halted) this.#halt();
    this.#registers[index] = value;
    if (halt && dividerReset) this.#phase = RELEASED_PHASE_MS;
    if (!halt && this.#halted) this.#resume();
  }

  #halt(): void {
    const time = this.#time();
    encodeTime(time, this.#format, this.#registers);
    this.#phase = modulo(time, 1000);
    this.#halted = true;
  }

  #resume(): void {
    this.#offset = decodeTime(this.#format, this.#registers) + this.#phase - this.#clock.now();
    this.#halted = false;
  }

  #readC(): number {
    const second = this.#second();
    if (this.#halted || second === this.#updateSecond) return 0;
    this.#updateSecond = second;
    return this.#format & B_UPDATE_INTERRUPT ? C_UPDATE_ENDED | C_INTERRUPT : C_UPDATE_ENDED;
  }

  #time(): number {
    return this.#clock.now() + this.#offset;
  }

  #second(): number {
    return Math.floor(this.#time() / 1000);
  }

  #updating(): boolean {
    return !this.#halted && modulo(this.#time(), 1000) >= 1000 - UPDATE_MS;
  }

  /** The memory sizes as PC firmware leaves them for boot loaders: KiB below and above 1 MiB, then units of 64 KiB. */
  #setMemory(below4GiB: number, above4GiB: number): void {
    const extended = Math.min(0xffff, Math.max(0, Math.floor((below4GiB - MiB) / KiB)));
    const above16MiB = Math.min(0xffff, Math.max(0, Math.floor((below4GiB - 16 * MiB) / (64 * KiB))));
    const high = Math.min(0xff_ffff, Math.max(0, Math.floor(above4GiB / (64 * KiB))));
    this.#set16(0x15, Math.min(640, Math.floor(below4GiB / KiB)));
    this.#set16(0x17, extended);
    this.#set16(0x30, extended);
    this.#set16(0x34, above16MiB);
    this.#set16(0x5b, high & 0xffff);
    this.#registers[0x5d] = high >> 16;
  }

  #set16(index: number, value: number): void {
    this.#registers[index] = value & 0xff;
    this.#registers[index + 1] = value >> 8;
  }
}

function modulo(value: number, by: number): number {
  return ((value % by) + by) % by;
}
