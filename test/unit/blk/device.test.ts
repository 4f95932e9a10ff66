import { describe, expect, test } from 'vitest';
import type { Disk } from '#dist/backends/disk/disk.js';
import { Blk } from '#dist/virtio/blk/blk.js';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { BlkRig, header, IOERR, OK, range, SECTOR, statusOf, UNSUPP } from '../../support/virtio/blk-rig.js';
import { HeldDisk } from '../../support/virtio/held-disk.js';
import { MockDriver } from '../../support/virtio/mock-driver.js';

const { VIRTIO_BLK_T_IN: IN, VIRTIO_BLK_T_OUT: OUT, VIRTIO_BLK_T_FLUSH: FLUSH } = abi;
const { VIRTIO_BLK_T_DISCARD: DISCARD, VIRTIO_BLK_T_WRITE_ZEROES: WRITE_ZEROES, VIRTIO_BLK_T_GET_ID: GET_ID } = abi;
const UNMAP = abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
const field = abi.virtio_blk_config;
const CONFIG_WCE = feature(abi.VIRTIO_BLK_F_CONFIG_WCE);
const F_FLUSH = feature(abi.VIRTIO_BLK_F_FLUSH);
const ALL = ~0n;

/** A device on a disk whose operations end when the test says so. */
function held({ features = ALL, readOnly = false, size = 1 << 20 } = {}) {
  const disk = new HeldDisk(size, readOnly);
  const rig = new BlkRig(disk, { features });
  /** A request that must complete without the disk. */
  const refused = (...buffers: (Uint8Array | number)[]) => {
    const done = rig.request(...buffers);
    expect(disk.operations).toEqual([]);
    return statusOf(done);
  };
  /** Completed requests' statuses, in the order in which the driver sees them. */
  const statuses = () => {
    rig.blk.publish();
    return rig.queue.completions().map(statusOf);
  };
  return { rig, disk, refused, statuses, queue: rig.queue };
}

function writeback(rig: BlkRig): number | undefined {
  return rig.driver.readConfig(field.wce, 1)[0];
}

describe('5.2.4: the configuration space', () => {
  test('tells the capacity in sectors and what the disk likes', () => {
    const { rig } = held({ size: 5 * 2 ** 40 + 512 });
    const view = new DataView(rig.driver.readConfig(0, field.sizeof).buffer);
    expect(view.getBigUint64(field.capacity, true)).toBe(BigInt(5 * 2 ** 40 + 512) / 512n);
    expect(view.getUint32(field.seg_max, true)).toBe(254);
    expect(view.getUint32(field.blk_size, true)).toBe(512);
    expect(view.getUint8(field.physical_block_exp)).toBe(3);
    expect(view.getUint8(field.alignment_offset)).toBe(0);
    expect(view.getUint16(field.min_io_size, true)).toBe(8);
    expect(view.getUint32(field.max_discard_sectors, true)).toBe(2 ** 21);
    expect(view.getUint32(field.max_discard_seg, true)).toBe(16);
    expect(view.getUint32(field.discard_sector_alignment, true)).toBe(8);
    expect(view.getUint32(field.max_write_zeroes_sectors, true)).toBe(2 ** 17);
    expect(view.getUint32(field.max_write_zeroes_seg, true)).toBe(16);
    expect(view.getUint8(field.write_zeroes_may_unmap)).toBe(1);
  });

  test('reads the same in any width, and nothing past its end', () => {
    const { rig } = held();
    const whole = rig.driver.readConfig(0, field.sizeof);
    for (let at = 0; at < field.sizeof; at++) expect(rig.driver.readConfig(at, 1)[0]).toBe(whole[at]);
    expect([...rig.driver.readConfig(field.sizeof - 1, 3)]).toEqual([whole.at(-1), 0xff, 0xff]);
    expect([...rig.driver.readConfig(0x800, 2)]).toEqual([0xff, 0xff]);
  });

  test('5.2.5.2: the padding bytes are 0', () => {
    const { rig } = held();
    const bytes = rig.driver.readConfig(0, field.sizeof);
    expect(bytes[field.wce + 1]).toBe(0);
    expect([...bytes.subarray(field.write_zeroes_may_unmap + 1, field.write_zeroes_may_unmap + 4)]).toEqual([0, 0, 0]);
  });

  test('only writeback is for the driver to write, and only as a byte', () => {
    const { rig } = held();
    const before = rig.driver.readConfig(0, field.sizeof);
    rig.driver.writeConfig(field.capacity, new Uint8Array(8).fill(1));
    rig.driver.writeConfig(field.wce, new Uint8Array(2));
    rig.driver.writeConfig(0x800, new Uint8Array(4));
    expect(rig.driver.readConfig(0, field.sizeof)).toEqual(before);
    rig.driver.writeConfig(field.wce, new Uint8Array(1));
    expect(writeback(rig)).toBe(0);
  });
});

describe('5.2.5.2: initialization', () => {
  test('FLUSH is offered, by a read-only device too; RO only by that', () => {
    const writable = held().rig.driver.offered;
    for (const bit of [
      abi.VIRTIO_BLK_F_SEG_MAX,
      abi.VIRTIO_BLK_F_BLK_SIZE,
      abi.VIRTIO_BLK_F_FLUSH,
      abi.VIRTIO_BLK_F_TOPOLOGY,
      abi.VIRTIO_BLK_F_CONFIG_WCE,
      abi.VIRTIO_BLK_F_DISCARD,
      abi.VIRTIO_BLK_F_WRITE_ZEROES,
    ])
      expect(writable & feature(bit)).not.toBe(0n);
    expect(writable & feature(abi.VIRTIO_BLK_F_RO)).toBe(0n);
    const readOnly = held({ readOnly: true }).rig.driver.offered;
    expect(readOnly & feature(abi.VIRTIO_BLK_F_RO)).not.toBe(0n);
    expect(readOnly & F_FLUSH).not.toBe(0n);
    for (const bit of [abi.VIRTIO_BLK_F_CONFIG_WCE, abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES])
      expect(readOnly & feature(bit)).toBe(0n);
  });

  test('writeback is 0 where CONFIG_WCE is negotiated and FLUSH is not, from FEATURES_OK on', () => {
    const rig = new BlkRig(new HeldDisk(), null);
    const { driver } = rig;
    const ready = abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER;
    driver.status = ready;
    driver.writeFeatures(CONFIG_WCE | feature(abi.VIRTIO_F_VERSION_1));
    driver.status = ready | abi.VIRTIO_CONFIG_S_FEATURES_OK;
    expect(driver.status & abi.VIRTIO_CONFIG_S_FEATURES_OK).not.toBe(0);
    expect(writeback(rig)).toBe(0);
    driver.initialize({ features: CONFIG_WCE | F_FLUSH });
    expect(writeback(rig)).toBe(1);
  });

  test('a reset sets writeback back; without CONFIG_WCE it cannot be written', () => {
    const { rig } = held();
    rig.driver.writeConfig(field.wce, new Uint8Array([0]));
    expect(writeback(rig)).toBe(0);
    rig.driver.status = 0;
    expect(writeback(rig)).toBe(1);
    rig.driver.writeConfig(field.wce, new Uint8Array([0])); // nothing is negotiated yet
    expect(writeback(rig)).toBe(1);
    rig.driver.initialize({ features: F_FLUSH });
    rig.driver.writeConfig(field.wce, new Uint8Array([0]));
    expect(writeback(rig)).toBe(1);
  });
});

describe('5.2.6: requests', () => {
  test('name their place in sectors, their data its length', () => {
    const { queue, disk, statuses } = held();
    queue.send([header(IN, 3), 1024, 512, 1]);
    queue.send([header(OUT, 2047), new Uint8Array(512), 1]);
    queue.send([header(FLUSH), 1]);
    expect(disk.operations).toMatchObject([
      { what: 'read', offset: 3 * SECTOR, length: 1536 },
      { what: 'write', offset: 2047 * SECTOR, length: 512 },
      { what: 'flush' },
    ]);
    for (let i = 0; i < 3; i++) disk.end();
    expect(statuses()).toEqual([OK, OK, OK]);
  });

  test('are completed in any order', () => {
    const { queue, disk, rig } = held();
    const heads = [0, 1, 2].map((sector) => queue.send([header(IN, sector), 512, 1]));
    disk.end(1, 0, new Uint8Array(512).fill(1));
    disk.end(1, 0, new Uint8Array(512).fill(2));
    rig.blk.publish();
    const done = queue.completions();
    expect(done.map(({ head }) => head)).toEqual([heads[1], heads[2]]);
    expect(done.map(({ data }) => data[0])).toEqual([1, 2]);
    disk.end(0, 0, new Uint8Array(512).fill(3));
    rig.blk.publish();
    expect(queue.completions()).toMatchObject([{ head: heads[0], written: 513 }]);
  });

  test('fill the whole queue at a time, and are shown once a batch', () => {
    const { queue, disk, rig } = held();
    for (let i = 0; i < 256; i++) queue.add([header(IN, i), 512, 1], { indirect: true });
    queue.notify();
    expect(disk.operations).toHaveLength(256);
    for (let i = 0; i < 256; i++) disk.end(0, 0, new Uint8Array(512).fill(i));
    expect(queue.usedIndex).toBe(0);
    rig.blk.publish();
    expect(rig.driver.interrupts).toBe(1);
    expect(queue.completions().map(({ data, written }) => [data[0], data[512], written])).toEqual(
      Array.from({ length: 256 }, (_, i) => [i, OK, 513]),
    );
  });

  test.each([false, true])('take headers, data and status split anyhow (indirect %s)', (indirect) => {
    const { queue, disk, rig } = held();
    const out = header(OUT, 5);
    const data = Uint8Array.from({ length: 1024 }, (_, i) => i);
    // The header in three pieces, the last of them with the first data; the data in odd pieces.
    const both = new Uint8Array([...out, ...data]);
    const cuts = [0, 1, 7, 20, 21, 600, 1040];
    const pieces = cuts.slice(1).map((end, i) => both.subarray(cuts[i], end));
    queue.send([...pieces, 1], { indirect });
    const written = new Uint8Array(1024);
    expect(disk.operations[0]?.segments?.read(0, written)).toBe(1024);
    expect(written).toEqual(data);
    expect(disk.operations).toMatchObject([{ what: 'write', offset: 5 * SECTOR, length: 1024 }]);
    disk.end();
    // The status shares a buffer with the last data.
    queue.send([out.fill(0), 3, 500, 10], { indirect });
    expect(disk.operations).toMatchObject([{ what: 'read', offset: 0, length: 512 }]);
    disk.end(0, 0, data.subarray(0, 512));
    rig.blk.publish();
    const [first, second] = queue.completions();
    expect(first).toMatchObject({ written: 1 });
    expect(second?.written).toBe(513);
    expect(second?.data).toEqual(new Uint8Array([...data.subarray(0, 512), OK]));
  });

  test('of an unknown type are unsupported', () => {
    const { refused } = held();
    for (const type of [2, 3, 5, 7, 9, 10, 12, 14, 26, 0x8000_0000, 0xffff_ffff])
      expect(refused(header(type), 512, 1)).toBe(UNSUPP);
  });

  test('without a whole header, or with data of half sectors, fail', () => {
    const { refused } = held();
    expect(refused(header(IN).subarray(0, 15), 512, 1)).toBe(IOERR);
    expect(refused(1)).toBe(IOERR);
    expect(refused(header(IN), 511, 1)).toBe(IOERR);
    expect(refused(header(IN), 513, 1)).toBe(IOERR);
    expect(refused(header(OUT), new Uint8Array(100), 1)).toBe(IOERR);
  });

  test('without a place for the status are used with nothing written', () => {
    const { rig, disk } = held();
    expect(rig.request(header(OUT), new Uint8Array(512))).toMatchObject({ written: 0 });
    expect(rig.request(header(FLUSH))).toMatchObject({ written: 0 });
    expect(disk.operations).toEqual([]);
    expect(rig.driver.broken).toEqual([]);
  });

  test('outside of the disk fail, whatever the 64 bits of the sector', () => {
    const { refused, disk, queue } = held({ size: 4096 });
    for (const type of [IN, OUT]) {
      const data = type === IN ? 512 : new Uint8Array(512);
      for (const sector of [8, 9, 2 ** 31, 2n ** 32n, 2n ** 53n, 2n ** 55n, 2n ** 63n, 2n ** 64n - 1n])
        expect(refused(header(type, sector), data, 1)).toBe(IOERR);
    }
    expect(refused(header(IN, 7), 1024, 1)).toBe(IOERR);
    expect(refused(header(IN, 0), 4096, 512, 1)).toBe(IOERR);
    queue.send([header(IN, 7), 512, 1]);
    expect(disk.asked).toEqual(['read']);
  });

  test('say of a read that failed that nothing was written', () => {
    const { queue, disk, rig } = held();
    queue.send([header(IN), 512, 1]);
    disk.end(0, -5);
    rig.blk.publish();
    const [done] = queue.completions();
    expect(done?.written).toBe(0);
    expect(statusOf(done)).toBe(IOERR);
  });

  test('GET_ID gives the serial number, padded with NUL', () => {
    const { rig } = held();
    const done = rig.request(header(GET_ID), 20, 1);
    expect(Buffer.from(done.data.subarray(0, 20)).toString('latin1')).toBe('serial-7'.padEnd(20, '\0'));
    expect([statusOf(done), done.written]).toEqual([OK, 21]);
    // A driver must give 20 bytes; one that does not gets no more than fits.
    expect(rig.request(header(GET_ID), 3, 1)).toMatchObject({ written: 4, data: new Uint8Array([115, 101, 114, OK]) });
    expect(rig.request(header(GET_ID), 30, 1).written).toBe(20);
  });

  test('are read once: what the guest changes afterwards does not matter', () => {
    const { queue, disk, rig } = held();
    const head = queue.send([header(WRITE_ZEROES), range(0, 1), range(1, 1), 1]);
    for (let i = 0; i < 3; i++) {
      const at = queue.descriptors + 16 * (head + i);
      rig.driver.memory.zero(rig.driver.memory.readU32(at), 16);
    }
    disk.end();
    expect(disk.operations).toMatchObject([{ what: 'zero', offset: SECTOR, length: SECTOR }]);
  });
});

describe('5.2.6.2: read-only devices', () => {
  test('fail every write with IOERR and write nothing, also for a driver that did not accept RO', () => {
    for (const features of [ALL, 0n]) {
      const { refused, disk, queue } = held({ readOnly: true, features });
      expect(refused(header(OUT), new Uint8Array(512), 1)).toBe(IOERR);
      expect(refused(header(DISCARD), range(0, 1), 1)).toBe(IOERR);
      expect(refused(header(WRITE_ZEROES), range(0, 1), 1)).toBe(IOERR);
      queue.send([header(IN), 512, 1]);
      expect(disk.asked).toEqual(['read']);
    }
  });
});

describe('5.2.6.2: discard and write zeroes', () => {
  test('unknown flags, and unmap in a discard, are unsupported, before anything is done', () => {
    const { refused } = held();
    for (const flags of [1, 2, 3, 0x8000_0000]) {
      expect(refused(header(DISCARD), range(0, 1, flags), 1)).toBe(UNSUPP);
      expect(refused(header(DISCARD), range(0, 1), range(1, 1, flags), 1)).toBe(UNSUPP);
    }
    for (const flags of [2, 3, 0x8000_0001])
      expect(refused(header(WRITE_ZEROES), range(0, 1), range(0, 1, flags), 1)).toBe(UNSUPP);
  });

  test('that were not negotiated are unsupported', () => {
    const { refused } = held({ features: F_FLUSH });
    expect(refused(header(DISCARD), range(0, 1), 1)).toBe(UNSUPP);
    expect(refused(header(WRITE_ZEROES), range(0, 1), 1)).toBe(UNSUPP);
  });

  test('malformed, too many, too long or outside of the disk fail before anything is done', () => {
    const { refused } = held({ size: 2 ** 31 });
    for (const type of [DISCARD, WRITE_ZEROES]) {
      expect(refused(header(type), 1)).toBe(IOERR);
      expect(refused(header(type), range(0, 1).subarray(0, 15), 1)).toBe(IOERR);
      expect(refused(header(type), range(0, 1), new Uint8Array(1), 1)).toBe(IOERR);
      expect(refused(header(type), ...Array.from({ length: 17 }, () => range(0, 1)), 1)).toBe(IOERR);
      expect(refused(header(type), range(0, 1), range(2 ** 22 - 1, 2), 1)).toBe(IOERR);
      expect(refused(header(type), range(2n ** 64n - 1n, 1), 1)).toBe(IOERR);
    }
    expect(refused(header(DISCARD), range(0, 2 ** 21 + 1), 1)).toBe(IOERR);
    expect(refused(header(WRITE_ZEROES), range(0, 2 ** 17 + 1), 1)).toBe(IOERR);
  });

  test('go over their ranges one after the other; empty ones are nothing', () => {
    const { queue, disk, statuses } = held();
    queue.send([header(WRITE_ZEROES), range(1, 2), range(5, 0), range(9, 1, UNMAP), 1]);
    expect(disk.operations).toMatchObject([{ what: 'zero', offset: SECTOR, length: 2 * SECTOR }]);
    disk.end();
    expect(disk.operations).toMatchObject([{ what: 'unmap', offset: 9 * SECTOR, length: SECTOR }]);
    expect(statuses()).toEqual([]);
    disk.end();
    expect(statuses()).toEqual([OK]);
    queue.send([header(DISCARD), range(0, 8), range(8, 8), 1]);
    disk.end(0, -28);
    expect(disk.operations).toEqual([]); // the rest is not tried
    expect(statuses()).toEqual([IOERR]);
  });
});

describe('5.2.6.2: when a write is stable', () => {
  /** Whether a write is flushed before it is completed. */
  function flushes(features: bigint, writeback?: number): boolean {
    const { rig, queue, disk, statuses } = held({ features });
    if (writeback !== undefined) rig.driver.writeConfig(field.wce, new Uint8Array([writeback]));
    queue.send([header(OUT), new Uint8Array(512), 1]);
    disk.end();
    const flushed = disk.asked.includes('flush');
    if (flushed) {
      expect(statuses()).toEqual([]);
      disk.end();
    }
    expect(statuses()).toEqual([OK]);
    return flushed;
  }

  test('1: at its completion, with neither CONFIG_WCE nor FLUSH', () => {
    expect(flushes(0n)).toBe(true);
  });

  test('2: at its completion, with CONFIG_WCE and writeback 0', () => {
    expect(flushes(CONFIG_WCE | F_FLUSH, 0)).toBe(true);
    expect(flushes(CONFIG_WCE)).toBe(true);
  });

  test('3: by a flush otherwise', () => {
    expect(flushes(F_FLUSH)).toBe(false);
    expect(flushes(CONFIG_WCE | F_FLUSH)).toBe(false);
    expect(flushes(CONFIG_WCE | F_FLUSH, 1)).toBe(false);
  });

  test('zeros too; and one that cannot be made stable fails', () => {
    const { rig, queue, disk, statuses } = held();
    rig.driver.writeConfig(field.wce, new Uint8Array([0]));
    queue.send([header(WRITE_ZEROES), range(0, 1), 1]);
    disk.end();
    expect(disk.asked).toEqual(['flush']);
    disk.end();
    queue.send([header(OUT), new Uint8Array(512), 1]);
    disk.end();
    disk.end(0, -5);
    expect(statuses()).toEqual([OK, IOERR]);
  });
});

describe('a failing host', () => {
  test('fails the request, says so with the drive and the place, and the device goes on', () => {
    const { rig, queue, disk, statuses } = held();
    queue.send([header(OUT, 4), new Uint8Array(1024), 1]);
    disk.end(0, -28);
    queue.send([header(FLUSH), 1]);
    disk.end(0, -5);
    queue.send([header(IN), 512, 1]);
    disk.end(0, -5);
    queue.send([header(IN), 512, 1]);
    disk.end();
    expect(statuses()).toEqual([IOERR, IOERR, IOERR, OK]);
    expect(rig.warnings).toEqual([
      'blk0 (held.img): writing 1024 bytes at 2048 failed with ENOSPC',
      'blk0 (held.img): flushing failed with EIO',
      'blk0 (held.img): reading 512 bytes at 0 failed with EIO',
    ]);
  });
});

describe('2.4.1: a reset while the disk is at work', () => {
  test('holds the vCPUs until the last is done; what comes late touches neither ring nor memory', () => {
    const { rig, queue, disk } = held();
    const before = queue.send([header(IN), 512, 1]);
    queue.send([header(OUT), new Uint8Array(512), 1]);
    queue.send([header(IN, 1), 512, 1]);
    disk.end(1);
    expect(rig.holds).toBe(0);
    const { memory } = rig.driver;
    const status = memory.readU32(queue.descriptors + 16 * (before + 2));
    memory.writeU8(status, 0x77);
    rig.driver.status = 0;
    expect(rig.holds).toBe(1);
    expect(disk.canceled).toBe(1);
    rig.driver.status = 0;
    expect(rig.holds).toBe(1);
    const used = queue.usedIndex;
    disk.end(1, -125);
    expect(rig.holds).toBe(1);
    disk.end();
    expect(rig.holds).toBe(0);
    rig.blk.publish();
    expect(queue.usedIndex).toBe(used);
    expect(memory.readU8(status)).toBe(0x77);
    expect(rig.warnings).toEqual([]);
  });

  test('with nothing under way holds nothing', () => {
    const { rig, queue, disk } = held();
    queue.send([header(IN), 512, 1]);
    disk.end();
    rig.driver.status = 0;
    expect(rig.holds).toBe(0);
  });

  test('ends a request of many operations at the one under way', () => {
    const { rig, queue, disk } = held();
    queue.send([header(WRITE_ZEROES), range(0, 1), range(1, 1), 1]);
    rig.driver.status = 0;
    disk.end();
    expect(disk.operations).toEqual([]);
    expect(rig.holds).toBe(0);
  });

  test('and a new driver has a device that works', () => {
    const { rig, queue, disk } = held();
    for (let i = 0; i < 3; i++) queue.send([header(IN), 512, 1]);
    disk.end();
    disk.end();
    rig.driver.status = 0;
    disk.end(0, -125);
    rig.driver.initialize();
    rig.queue.send([header(IN, 9), 512, 1]);
    expect(disk.operations).toMatchObject([{ what: 'read', offset: 9 * SECTOR }]);
    disk.end();
    rig.blk.publish();
    expect(rig.queue.completions().map(statusOf)).toEqual([OK]);
  });
});

describe('saved and restored', () => {
  const move = (rig: BlkRig, disk: Disk) => {
    const blk = new Blk({ name: 'blk0', disk, id: '', holdVcpus: () => () => {}, failed: () => {} });
    return { blk, state: rig.driver.move(blk) };
  };

  test('it goes on with the disk that it is given, writeback as it was', () => {
    const { rig, disk } = held();
    rig.driver.writeConfig(field.wce, new Uint8Array([0]));
    rig.queue.send([header(IN, 3), 512, 1]);
    disk.end();
    rig.blk.publish();
    rig.queue.add([header(IN, 4), 512, 1]); // which nobody was told of
    const other = new HeldDisk();
    const { blk, state } = move(rig, other);
    expect(state.device).toEqual({ writeback: false, size: 1 << 20 });
    expect(writeback(rig)).toBe(0);
    expect(other.operations).toMatchObject([{ what: 'read', offset: 4 * SECTOR }]);
    other.end();
    blk.publish();
    expect(rig.queue.completions().map(statusOf)).toEqual([OK, OK]);
    expectDamageIsRefused(rig.driver.transport.save(), () => {
      const again = new Blk({ name: 'blk0', disk: other, id: '', holdVcpus: () => () => {}, failed: () => {} });
      return new MockDriver(again, rig.driver.memory).transport;
    });
  });

  test('a disk of another size is refused by name', () => {
    const { rig } = held();
    const message = expect.stringMatching(
      /^snapshot: blk0: held.img has 2097152 bytes, but the guest’s disk had 1048576;/,
    );
    expect(() => move(rig, new HeldDisk(1 << 21))).toThrow(expect.objectContaining({ code: 'ERR_SNAPSHOT', message }));
  });

  test('a disk that became read-only is refused to a driver that may write', () => {
    const { rig } = held();
    expect(() => move(rig, new HeldDisk(1 << 20, true))).toThrow(/driverFeatures are not what this device offers here/);
  });
});
