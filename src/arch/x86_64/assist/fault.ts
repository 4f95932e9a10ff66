/** Exception vectors (SDM 3A 6.15). */
export const vector = { DB: 1, BP: 3, UD: 6, NM: 7, NP: 11, SS: 12, GP: 13, PF: 14, MF: 16 } as const;

/** An exception that the instruction being completed raises in the guest. */
export class GuestFault extends Error {
  readonly vector: number;
  readonly errorCode: number | undefined;
  /** The address that faulted, for a page fault. */
  readonly cr2: bigint | undefined;

  constructor(number: number, errorCode?: number, cr2?: bigint) {
    super(`guest exception ${number}`);
    this.vector = number;
    this.errorCode = errorCode;
    this.cr2 = cr2;
  }
}

export const undefinedOpcode = () => new GuestFault(vector.UD);
export const generalProtection = (errorCode = 0) => new GuestFault(vector.GP, errorCode);

/** A form of an instruction, or a mode, that nothing here completes. */
export class Unsupported extends Error {}
