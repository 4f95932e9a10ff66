import { Machine, type MachineConfig } from '#dist/index.js';
import { guestProgram } from '../guest-program.js';

export const COUNTING_MEMORY = 4 * 2 ** 20;
/** Guest physical address. */
export const RESET_FLAG = 0x30_0000;

/**
 * A guest that counts: it keeps a count and a checksum of it in registers and in memory, compares them at every step, and
 * prints `.` every 64 steps on ttyS0; `!` and an exit code of 99 when they differ. It resets itself when
 * its memory is not 0 at RESET_FLAG.
 */
export const COUNTING = guestProgram(`
    .set RESET_FLAG, ${RESET_FLAG}
    xor r8, r8
    xor r9, r9
    mov dx, SERIAL + 3
    mov al, 3
    out dx, al
  again:
    cmp r8, [0x200000]
    jne wrong
    cmp r9, [0x200008]
    jne wrong
    inc r8
    imul r9, r9, 31
    add r9, r8
    mov [0x200000], r8
    mov [0x200008], r9
    mov rbx, r8
    and rbx, 511
    mov [0x201000 + rbx * 8], r9
    test r8, 63
    jnz again
    mov dx, SERIAL
    mov al, '.'
    out dx, al
    cmp byte ptr [RESET_FLAG], 0
    je again
    mov al, 0xfe
    out I8042, al
    jmp again
  wrong:
    mov dx, SERIAL
    mov al, '!'
    out dx, al
    mov al, 99
    out DEBUG_EXIT, al
    hlt`);

export function countingMachine(config: Partial<MachineConfig> = {}): Promise<Machine> {
  return Machine.create({ kernel: COUNTING, memory: COUNTING_MEMORY, ...config });
}

/** Waits until it has counted on for so many steps of 64. */
export async function countsOn(machine: Machine, dots = 3): Promise<void> {
  let seen = '';
  await new Promise<void>((resolve, reject) => {
    const onData = (chunk: Buffer) => {
      seen += chunk.toString('latin1');
      if (seen.includes('!')) reject(new Error('the guest found that its memory and registers differ'));
      if (seen.length < dots) return;
      machine.serial.off('data', onData);
      resolve();
    };
    machine.serial.on('data', onData);
    machine.wait().then(({ message }) => reject(new Error(message)), reject);
  });
}
