import * as abi from './generated/abi.js';

const names = new Map<number, string>();
for (const [name, value] of Object.entries(abi)) {
  if (name.startsWith('KVM_EXIT_') && !/_IO_(IN|OUT)$/.test(name) && typeof value === 'number') {
    names.set(value, name.slice('KVM_EXIT_'.length).toLowerCase());
  }
}

/** `io` for KVM_EXIT_IO: the name under which an exit is counted and reported. */
export function exitName(reason: number): string {
  return names.get(reason) ?? `exit-${reason}`;
}
