import { getSystemErrorMap } from 'node:util';
import { AgentError, errnoName, GuestError } from '../errors.js';
import { type Frame, FrameType, PayloadReader, violation } from './protocol.js';

export const EPROTO = 71;

/** The errno of an ERROR frame; undefined of what is none. */
export function errnoOf({ type, payload }: Frame): number | undefined {
  return type === FrameType.error && payload.length >= 4 ? payload.readUInt32LE(0) : undefined;
}

/** What an ERROR frame says, or else that the frame is not what was expected. */
export function frameError(code: 'ERR_EXEC' | 'ERR_GUEST_FILE', frame: Frame): Error {
  if (frame.type !== FrameType.error) return violation(`an unexpected frame of type ${frame.type}`);
  const payload = new PayloadReader(frame.payload);
  const errno = payload.u32();
  const subject = printable(payload.string());
  payload.end();
  if (errno === EPROTO) return new AgentError(`the guest's agent: ${subject}`);
  const name = errnoName(errno);
  const text = getSystemErrorMap().get(-errno)?.[1] ?? 'unknown error';
  return new GuestError(code, name, `${subject} (in the guest): ${text} (${name})`);
}

/** The guest's text goes to terminals and logs: without control characters. */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what it is about
  return text.replace(/[\u0000-\u001f\u007f-\u009f]/g, '?');
}
