import { guestProgram } from './guest-program.js';

/** A guest that prints so many bytes on its serial port, 0, 1 … 255, 0 …, and ends with an exit code. */
export const talkingGuest = (count: number, code: number) =>
  guestProgram(`
      mov ecx, ${count}
      xor ebx, ebx
    next:
      mov dx, SERIAL + 5
    wait:
      in al, dx
      test al, 0x20
      jz wait
      mov dx, SERIAL
      mov al, bl
      out dx, al
      inc ebx
      loop next
      mov al, ${code}
      out DEBUG_EXIT, al`);
