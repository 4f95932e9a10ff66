import type { Random } from '../../kvm/assist/random.js';
import { type Json, sealed } from '../../support/snapshot/folder.js';

const NUMBERS = [
  0,
  1,
  -1,
  2,
  15,
  255,
  256,
  4095,
  4096,
  65_535,
  2 ** 31,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 40,
  2 ** 53,
  2 ** 64,
];
const TEXTS = ['', 'x', '0', '-1', 'ffffffffffffffff', '\0', '../..', '/dev/kvm', '\x1b[2J\n', 'A'.repeat(100_000)];

/** A value that is likely to be no good somewhere. */
function anything(random: Random): Json {
  const rare = [null, true, false, 0.5, 1e300, [], {}, [null], [[]], { a: 1 }];
  return random.pick<Json>([...NUMBERS, ...TEXTS, ...rare]);
}

/** A changed copy of a state, and what was done to it. */
export function mutate(state: Json, random: Random): { bytes: Buffer; whole: boolean; steps: string[] } {
  const changed = structuredClone(state);
  const steps: string[] = [];
  // Gentle ones come past the checks of form, to KVM and the devices.
  const gentle = random.chance(70);
  if (random.chance(40)) steps.push(useDevice(changed, random));
  for (let n = 1 + random.below(random.pick([1, 4])); n > 0; n--) steps.push(mutateOne(changed, gentle, random));
  const body = Buffer.from(JSON.stringify(changed));
  if (!gentle && random.chance(30)) {
    for (let n = 1 + random.below(8); n > 0; n--) body[random.below(body.length)] = random.below(256);
    steps.push('bytes of the JSON');
  }
  const bytes = sealed(body);
  const whole = gentle || random.chance(90);
  if (!whole) {
    if (random.chance(50)) bytes[random.below(bytes.length)] = random.below(256);
    else return { bytes: bytes.subarray(0, random.below(bytes.length)), whole, steps: [...steps, 'cut'] };
    steps.push('a byte of the file');
  }
  return { bytes, whole, steps };
}

/** Most changes are to vCPUs and devices: a walk from the root would mostly end before it is there. */
function mutateOne(state: Json, gentle: boolean, random: Random): string {
  let path = '';
  let at = state;
  if (random.chance(gentle ? 95 : 50) && typeof state.machine === 'object' && state.machine !== null) {
    path = 'machine';
    at = state.machine;
  }
  for (;;) {
    const names = Object.keys(at);
    if (names.length === 0) break;
    const name = random.pick(names);
    const child = at[name];
    if (typeof child === 'object' && child !== null && Object.keys(child).length > 0 && random.chance(90)) {
      path += `.${name}`;
      at = child;
      continue;
    }
    return `${path}.${name}: ${change(at, name, gentle ? NEAR : random.below(10), random)}`;
  }
  return `${path}: nothing`;
}

const NEAR = 9;

/** @param how 0 to 9, most of which change a value into one of its kind. */
function change(at: Json, name: string, how: number, random: Random): string {
  const value = at[name];
  switch (how) {
    case 0:
      delete at[name];
      return 'removed';
    case 1:
      at[name] = anything(random);
      return JSON.stringify(at[name]).slice(0, 40);
    case 2: {
      const other = random.pick(Object.keys(at));
      at[name] = at[other];
      return `that of ${other}`;
    }
    case 3:
      if (!Array.isArray(at)) {
        at[random.pick(['__proto__', 'constructor', 'toString', 'length', 'x'])] = anything(random);
        return 'and another field';
      }
      if (random.chance(50)) at.push(...structuredClone(at));
      else at.length = random.below(at.length);
      return `a list of ${at.length}`;
    default:
      at[name] = near(value, random);
      return `${JSON.stringify(at[name])?.slice(0, 40)}`;
  }
}

/** A value of the same kind. */
function near(value: Json, random: Random): Json {
  if (typeof value === 'number') {
    if (random.chance(30)) return random.pick(NUMBERS);
    return random.chance(50) ? Math.abs(value + random.pick([-1, 1])) : (value ^ (1 << random.below(31))) >>> 0;
  }
  if (typeof value === 'boolean') return !value;
  if (typeof value !== 'string') return anything(random);
  if (/^[0-9a-f]{1,16}$/.test(value)) return random.u64().toString(16);
  const bytes = Buffer.from(value, 'base64');
  if (bytes.length < 8) return random.pick(TEXTS);
  for (let n = 1 + random.below(4); n > 0; n--) {
    const place = random.below(bytes.length);
    const aligned = place - (place % 8);
    if (random.chance(40)) bytes[place] = random.below(256);
    else if (aligned + 8 > bytes.length || random.chance(30))
      bytes[place] = (bytes[place] as number) ^ (1 << random.below(8));
    else bytes.writeBigUInt64LE(random.u64(), aligned);
  }
  if (random.chance(2)) return bytes.subarray(0, random.below(bytes.length)).toString('base64');
  return bytes.toString('base64');
}

/** A driver uses a virtio device: what it wrote of its queues is in memory, or anything is. */
function useDevice({ machine }: Json, random: Random): string {
  const name = random.pick(Object.keys(machine.devices.mmio));
  const device = machine.devices.mmio[name];
  device.status = 15;
  device.driverFeatures = (
    0x1_0000_0000n |
    (BigInt(random.below(4)) << 28n) |
    (random.chance(20) ? BigInt(random.below(8)) : 0n)
  ).toString(16);
  for (const queue of device.queues) {
    const base = 0x20_0000 + 4096 * random.below(256);
    const nextAvailable = random.below(random.pick([1, 65_536]));
    Object.assign(queue, { size: 8, descriptors: base, available: base + 1024, used: base + 2048, nextAvailable });
    Object.assign(queue, { ready: true, alive: random.chance(90), nextUsed: nextAvailable });
  }
  return `${name} is in use`;
}
