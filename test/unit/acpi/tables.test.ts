import { describe, expect, test } from 'vitest';
import {
  type AcpiHardware,
  renewGenerationId,
  type VirtioSlot,
  writeAcpiTables,
} from '#dist/arch/x86_64/acpi/tables.js';
import { E820_RESERVED, memoryMap } from '#dist/boot/memory-map.js';
import { SleepControl } from '#dist/devices/sleep-control.js';
import { UsageError } from '#dist/errors.js';
import { gsi, IOAPIC_PINS, layout, MAX_CPUS, PAGE_SIZE, ports } from '#dist/machine/layout.js';
import { MiB, ram } from '../../support/boot-images.js';
import { AmlReader, readMadt, readResources, readTables, sort, type Table } from './read-tables.js';

const slots = (count: number): VirtioSlot[] =>
  Array.from({ length: count }, (_, i) => ({
    base: layout.virtioMmioBase + i * layout.virtioMmioStride,
    length: layout.virtioMmioStride,
    gsi: 5 + (i % 19),
  }));

function tables(hardware: Partial<AcpiHardware> = {}) {
  const memory = ram(2 * MiB);
  const rsdp = writeAcpiTables(memory, { cpus: 1, serial: true, virtio: [], ...hardware });
  const found = readTables(memory, rsdp);
  const table = (signature: string) => found.get(signature) as Table;
  return { memory, rsdp, found, table };
}

/** The DSDT's own names, and the devices of its \\_SB with _CRS parsed. */
function dsdt(hardware: Partial<AcpiHardware>) {
  const { names, blocks } = sort(new AmlReader(tables(hardware).table('DSDT').bytes.subarray(36)).terms());
  expect(blocks.map(({ kind, path }) => [kind, path])).toEqual([['scope', '\\_SB_']]);
  const scope = sort(blocks[0]?.terms ?? []);
  expect(scope.names).toEqual([]);
  const devices = scope.blocks.map(({ kind, path, terms }) => {
    const { names, methods } = sort(terms);
    const properties = new Map(names.map((name) => [name.path, name.value]));
    expect([kind, properties.size + methods.length]).toEqual(['device', terms.length]);
    const crs = properties.get('_CRS') as Uint8Array | undefined;
    const resources = crs ? readResources(crs) : [];
    return { path, hid: properties.get('_HID'), uid: properties.get('_UID'), resources, properties, methods };
  });
  return { names, devices };
}

/** What section 19.6.36 (EISAID) makes of an ID. */
const SERIAL_PORT = 0x0105d041; // PNP0501
const REAL_TIME_CLOCK = 0x000bd041; // PNP0B00

describe('the chain from the RSDP', () => {
  test.each([0, 1, 37, 500])('reaches XSDT, FADT, MADT and DSDT with %i virtio devices', (count) => {
    const { memory, rsdp, found } = tables({ virtio: slots(count) });
    expect(rsdp).toBe(layout.acpiTables);
    expect([...found.keys()].sort()).toEqual(['APIC', 'DSDT', 'FACP', 'XSDT']);
    const extents = [{ at: rsdp, end: rsdp + 36 }];
    for (const { at, bytes } of found.values()) extents.push({ at, end: at + bytes.length });
    extents.sort((a, b) => a.at - b.at);
    for (const [i, { at, end }] of extents.entries()) {
      expect(at % 16).toBe(0);
      expect(end).toBeLessThanOrEqual(extents[i + 1]?.at ?? layout.acpiTablesEnd);
    }
    // Nothing is written elsewhere.
    const end = extents.at(-1)?.end as number;
    expect(memory.slice(0, layout.acpiTables).every((byte) => byte === 0)).toBe(true);
    expect(memory.slice(end, 2 * MiB - end).every((byte) => byte === 0)).toBe(true);
  });

  test('the revisions', () => {
    const { table } = tables();
    expect(['XSDT', 'FACP', 'APIC', 'DSDT'].map((signature) => table(signature).revision)).toEqual([1, 6, 5, 2]);
    expect(table('FACP').bytes[131]).toBe(4); // ACPI 6.4
  });

  test('every table names its maker in printable characters', () => {
    for (const { bytes } of tables().found.values()) {
      for (const [from, to] of [
        [10, 24],
        [28, 32],
      ]) {
        expect(Buffer.from(bytes.subarray(from, to)).toString()).toMatch(/^[A-Z ]+$/);
      }
    }
  });
});

describe('FADT', () => {
  const { bytes, view } = tables().table('FACP');
  const register = (at: number) => ({
    space: bytes[at],
    width: bytes[at + 1],
    offset: bytes[at + 2],
    access: bytes[at + 3],
    address: view.getBigUint64(at + 4, true),
  });
  const port = (address: number) => ({ space: 1, width: 8, offset: 0, access: 1, address: BigInt(address) });

  test('is of revision 6’s size and names the hypervisor', () => {
    expect(bytes.length).toBe(276);
    expect(Buffer.from(bytes.subarray(268)).toString()).toBe('TSVISOR ');
  });

  test('says: hardware-reduced, a reset register, no buttons and no RTC wake in fixed hardware', () => {
    const bits = [...Array(32).keys()].filter((bit) => view.getUint32(112, true) & (1 << bit));
    expect(bits).toEqual([0, 4, 5, 6, 10, 20]); // 0: WBINVD
  });

  test('says: ISA devices and a CMOS clock, but no keyboard controller to drive and no VGA', () => {
    expect(view.getUint16(109, true)).toBe(0b000101);
    expect(bytes[108]).toBe(0x32); // CENTURY
  });

  test('resets through the i8042', () => {
    expect(register(116)).toEqual(port(ports.i8042.base + 4));
    expect(bytes[128]).toBe(0xfe);
  });

  test('has no register of full ACPI hardware', () => {
    expect(bytes.subarray(36, 108).every((byte) => byte === 0)).toBe(true);
    expect(bytes.subarray(148, 244).every((byte) => byte === 0)).toBe(true);
    expect(view.getBigUint64(132, true)).toBe(0n); // X_FIRMWARE_CTRL
  });

  test('with \\_S5 powers the machine off as acpi_hw_extended_sleep() in Linux does', () => {
    const { names } = dsdt({});
    const sleepType = 5;
    expect(names).toEqual([{ kind: 'name', path: '\\_S5_', value: [sleepType, sleepType, 0, 0] }]);
    const [control, status] = [register(244), register(256)];
    expect([control, status]).toEqual([port(ports.sleepControl.base), port(ports.sleepControl.base)]);
    let off = 0;
    const device = new SleepControl(() => off++);
    const write = (address: bigint, value: number) =>
      device.writeByte(Number(address) - ports.sleepControl.base, value);
    const WAKE_STATUS = 0x80;
    write(status.address, WAKE_STATUS);
    expect(off).toBe(0);
    write(control.address, (sleepType << 2) | 0x20);
    expect(off).toBe(1);
    expect(device.readByte(Number(status.address) - ports.sleepControl.base) & WAKE_STATUS).toBe(0);
  });
});

describe('MADT', () => {
  test.each([1, 2, 37, MAX_CPUS])('%i CPUs', (cpus) => {
    const madt = tables({ cpus }).table('APIC');
    expect(madt.view.getUint32(36, true)).toBe(layout.localApic);
    expect(madt.view.getUint32(40, true)).toBe(1); // PCAT_COMPAT
    const ioapic = [cpus, 0, 0x00, 0x00, 0xc0, 0xfe, 0, 0, 0, 0];
    expect(readMadt(madt)).toEqual([
      ...Array.from({ length: cpus }, (_, id) => ({ type: 0, body: [id, id, 1, 0, 0, 0] })),
      { type: 1, body: ioapic },
      { type: 4, body: [0xff, 0, 0, 1] },
    ]);
  });
});

describe('DSDT', () => {
  test.each([0, 1, 2, 37, 300])('%i virtio devices, each where it is', (count) => {
    const virtio = slots(count);
    const { devices } = dsdt({ virtio });
    const found = devices.filter(({ hid }) => hid === 'LNRO0005');
    expect(found.map(({ uid }) => uid)).toEqual([...virtio.keys()]);
    expect(found.map(({ resources }) => resources)).toEqual(
      virtio.map(({ base, length, gsi }) => [
        { kind: 'memory', writable: true, base, length },
        { kind: 'interrupt', consumer: true, trigger: 'edge', polarity: 'high', sharing: 'exclusive', gsis: [gsi] },
      ]),
    );
    expect(new Set(devices.map(({ path }) => path)).size).toBe(devices.length);
  });

  test('the UART, if there is one', () => {
    const find = (serial: boolean) =>
      dsdt({ serial, virtio: slots(2) }).devices.filter(({ hid }) => hid === SERIAL_PORT);
    const interrupt = { consumer: true, trigger: 'edge', polarity: 'high', sharing: 'exclusive', gsis: [4] };
    expect(find(true).map(({ resources }) => resources)).toEqual([
      [
        { kind: 'io', decode: 16, min: 0x3f8, max: 0x3f8, length: 8 },
        { kind: 'interrupt', ...interrupt },
      ],
    ]);
    expect(find(false)).toEqual([]);
  });

  test('the clock, without an interrupt', () => {
    const [clock] = dsdt({}).devices.filter(({ hid }) => hid === REAL_TIME_CLOCK);
    expect(clock?.resources).toEqual([{ kind: 'io', decode: 16, min: 0x70, max: 0x70, length: 2 }]);
  });

  test('the VM generation ID: where it is, by both names that it goes by', () => {
    const [device, ...others] = dsdt({}).devices.filter(({ path }) => path === 'VGEN');
    expect(others).toEqual([]);
    expect(device?.methods).toEqual([]);
    expect(Object.fromEntries(device?.properties ?? [])).toEqual({
      _HID: 'TSVG0001',
      _CID: ['VM_Gen_Counter', 'VMGENCTR'],
      _DDN: 'VM_Gen_Counter',
      ADDR: [layout.vmGenerationId, 0],
    });
    // Section "How to implement": 8-byte aligned, in a page that nothing else is in and that the OS takes for no RAM.
    expect(layout.vmGenerationId % PAGE_SIZE).toBe(0);
    expect(layout.vmGenerationId).toBeGreaterThanOrEqual(layout.acpiTablesEnd);
    const map = memoryMap(ram(2 * MiB), true);
    expect(
      map.some(
        ({ start, end, type }) =>
          start < layout.highMemoryStart && end > layout.vmGenerationId && type === E820_RESERVED,
      ),
    ).toBe(true);
  });

  test('an event device that notifies it of the interrupt, which is nobody else’s', () => {
    const [device] = dsdt({}).devices.filter(({ hid }) => hid === 'ACPI0013');
    const flags = { kind: 'interrupt', consumer: true, polarity: 'high', trigger: 'edge', sharing: 'exclusive' };
    expect(device?.resources).toEqual([{ ...flags, gsis: [gsi.vmGenerationId] }]);
    const oneArgumentSerialized = 0b1001;
    expect(device?.methods).toEqual([
      { kind: 'method', path: '_EVT', flags: oneArgumentSerialized, notifications: [{ path: 'VGEN', value: 0x80 }] },
    ]);
    const all = Object.values(gsi).flat();
    expect(new Set(all).size).toBe(all.length);
    expect(Math.max(...all)).toBeLessThan(IOAPIC_PINS);
  });

  test('a device above 4 GiB or with a wrong interrupt is refused, not truncated', () => {
    const slot = slots(1)[0] as VirtioSlot;
    for (const wrong of [{ base: 2 ** 32 }, { base: -4096 }, { length: 2 ** 32 }, { gsi: -1 }, { gsi: 0.5 }]) {
      expect(() => tables({ virtio: [{ ...slot, ...wrong }] })).toThrow(RangeError);
    }
  });
});

test('a generation ID is another each time, and 16 bytes', () => {
  const memory = ram(2 * MiB);
  const ids = Array.from({ length: 4 }, () => {
    renewGenerationId(memory);
    return Buffer.from(memory.slice(layout.vmGenerationId, 16)).toString('hex');
  });
  expect(new Set(ids).size).toBe(4);
  const { vmGenerationId: at } = layout;
  expect(memory.slice(0, at).every((byte) => byte === 0)).toBe(true);
  expect(memory.slice(at + 16, 2 * MiB - at - 16).every((byte) => byte === 0)).toBe(true);
});

test('too many devices are an error, with nothing written beyond the tables’ place', () => {
  const fits = (count: number, cpus: number) => {
    const memory = ram(2 * MiB);
    try {
      writeAcpiTables(memory, { cpus, serial: true, virtio: slots(count) });
      return true;
    } catch (error) {
      expect(error).toBeInstanceOf(UsageError);
      expect((error as Error).message).toContain(`${count} virtio devices`);
      return false;
    } finally {
      const beyond = memory.slice(layout.acpiTablesEnd, 2 * MiB - layout.acpiTablesEnd);
      expect(beyond.every((byte) => byte === 0)).toBe(true);
    }
  };
  /** The last number for which a test holds that holds for the first and not for the last. */
  const last = (first: number, until: number, holds: (n: number) => boolean) => {
    expect([holds(first), holds(until)]).toEqual([true, false]);
    let [low, high] = [first, until];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (holds(middle)) low = middle;
      else high = middle;
    }
    return low;
  };
  const most = last(37, 2500, (count) => fits(count, MAX_CPUS));
  // To the byte, with CPUs to fill up: their entries are smaller than a device's.
  const cpus = last(1, MAX_CPUS, (cpus) => fits(most + 5, cpus));
  // The last that fits is whole.
  const virtio = slots(most + 5);
  const ends = [...tables({ cpus, virtio }).found.values()].map(({ at, bytes }) => at + bytes.length);
  expect(ends.length).toBe(4);
  expect(Math.max(...ends)).toBeLessThanOrEqual(layout.acpiTablesEnd);
  expect(dsdt({ cpus, virtio }).devices.length).toBe(virtio.length + 4);
});
