import { resolve } from 'node:path';
import { parseAddress } from '../migration/address.js';

/** An address that means the same to a process with another working directory. @throws UsageError */
export function wholeAddress(text: string): string {
  const address = parseAddress(text);
  return address.kind === 'unix' ? `unix:${resolve(address.path)}` : text;
}
