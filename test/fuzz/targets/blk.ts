import {
  closeSync,
  fstatSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { AllocationBitmap } from '#dist/backends/disk/allocation-bitmap.js';
import type { Disk } from '#dist/backends/disk/disk.js';
import { type ImageFile, openImage } from '#dist/backends/disk/image-file.js';
import { createOverlay, type OverlayFile, openOverlay } from '#dist/backends/disk/overlay-file.js';
import { OverlayImage } from '#dist/backends/disk/overlay-image.js';
import { RawImage } from '#dist/backends/disk/raw-image.js';
import { Blk } from '#dist/virtio/blk/blk.js';
import type { DescriptorChain } from '#dist/virtio/chain.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import type { Random } from '../../kvm/assist/random.js';
import { header, OK, range, SECTOR } from '../../support/virtio/blk-rig.js';
import { type Change, ManualIo, PerMemory } from '../host.js';
import { type FuzzMachine, type Memory, Violation } from '../machine.js';
import type { Request, Subject, Target } from '../target.js';

/** Not a multiple of an overlay's clusters. */
const SECTORS = 131;
const SIZE = SECTORS * SECTOR;
const CLUSTER = 4096;
const CANARY = new Uint8Array(8192).fill(0x5a);
const HOLE = new Uint8Array(CLUSTER);
const PATTERN = Uint8Array.from({ length: SIZE }, (_, i) => (i * 31 + (i >> 9)) & 0xff);
const { virtio_blk_discard_write_zeroes: RANGE } = abi;

/** The files of all cases of a target. */
class Files implements Disposable {
  readonly memory: Memory;
  readonly io: ManualIo;
  readonly image: ImageFile;
  readonly overlay: OverlayFile | undefined;
  readonly #folder = mkdtempSync(join(tmpdir(), 'tsvisor-fuzz-'));
  /** A file that no guest was given, on the descriptors beside those of the image. */
  readonly #canaries: number[];

  constructor(memory: Memory, withOverlay: boolean) {
    this.memory = memory;
    this.io = new ManualIo(memory);
    const path = join(this.#folder, 'image');
    const canary = join(this.#folder, 'canary');
    writeFileSync(path, PATTERN);
    writeFileSync(canary, CANARY);
    this.#canaries = [openSync(canary, 'r+')];
    this.image = openImage(path, { writable: true, direct: false });
    if (withOverlay) {
      createOverlay(join(this.#folder, 'overlay'), this.image, path);
      this.overlay = openOverlay(join(this.#folder, 'overlay'), this.image, path, false);
    }
    this.#canaries.push(openSync(canary, 'r+'));
  }

  /** The disk as it is at first. @param readOnly of a raw image. */
  fresh(readOnly: boolean): Disk {
    this.io.clear();
    const { image, overlay } = this;
    if (!overlay) {
      writeSync(image.fd, PATTERN, 0, SIZE, 0);
      return new RawImage('image', image, { readOnly, unsafe: false });
    }
    ftruncateSync(overlay.fd, overlay.bitmapOffset);
    ftruncateSync(overlay.fd, overlay.dataOffset + SIZE);
    const bitmap = new AllocationBitmap(new Uint8Array(CLUSTER), Math.ceil(SIZE / CLUSTER));
    return new OverlayImage('overlay', image, { ...overlay, bitmap }, false);
  }

  /** @param permitted the sectors that a request may have changed. */
  check(permitted: Uint8Array): void {
    const { image, overlay } = this;
    if (fstatSync(image.fd).size !== SIZE) throw new Violation('the image has another size');
    const bytes = readAll(image.fd, 0, SIZE);
    for (let sector = same(bytes, PATTERN) ? SECTORS : 0; sector < SECTORS; sector++) {
      const [from, to] = [sector * SECTOR, (sector + 1) * SECTOR];
      if (permitted[sector] && !overlay) continue;
      if (!same(bytes.subarray(from, to), PATTERN.subarray(from, to))) {
        throw new Violation(`sector ${sector} of the image changed, which no request asked for`);
      }
    }
    for (const canary of this.#canaries) {
      if (!same(readAll(canary, 0, CANARY.length + 1), CANARY)) throw new Violation('the canary was written');
    }
    if (overlay) this.#checkOverlay(overlay, permitted);
  }

  [Symbol.dispose](): void {
    for (const fd of [...this.#canaries, this.image.fd, ...(this.overlay ? [this.overlay.fd] : [])]) closeSync(fd);
    this.io[Symbol.dispose]();
    rmSync(this.#folder, { recursive: true });
  }

  /** Clusters that nobody wrote to are still holes. */
  #checkOverlay({ fd, dataOffset }: OverlayFile, permitted: Uint8Array): void {
    if (fstatSync(fd).size !== dataOffset + SIZE) throw new Violation('the overlay has another size');
    const bytes = readAll(fd, dataOffset, SIZE);
    const perCluster = CLUSTER / SECTOR;
    for (let cluster = 0; cluster * perCluster < SECTORS; cluster++) {
      if (permitted.subarray(cluster * perCluster, (cluster + 1) * perCluster).some((may) => may !== 0)) continue;
      const part = bytes.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER);
      if (!same(part, HOLE.subarray(0, part.length))) {
        throw new Violation(`cluster ${cluster} of the overlay was written, which no request asked for`);
      }
    }
  }
}

class BlkSubject implements Subject {
  device: Blk;
  readonly writableConfig = [abi.virtio_blk_config.wce];
  readonly #files: Files;
  readonly #permitted = new Uint8Array(SECTORS);
  #machine: FuzzMachine | undefined;
  #holds = 0;

  constructor(random: Random, files: Files) {
    this.#files = files;
    const { io } = files;
    const disk = files.fresh(!files.overlay && random.chance(10));
    disk.attach(io, files.memory.device);
    io.failing = random.chance(15);
    io.onChange = (change) => this.#checkChange(change);
    this.device = this.#make(disk);
  }

  renew(): Blk {
    this.#files.io.finishAll();
    this.device = this.#make(this.device.disk);
    return this.device;
  }

  #make(disk: Disk): Blk {
    const { io } = this.#files;
    const blk = new Blk({
      name: 'blk0',
      disk,
      id: 'fuzz',
      holdVcpus: () => {
        if (this.#holds++ > 0) throw new Error('the vCPUs are held twice');
        return () => this.#holds--;
      },
      failed: () => {},
    });
    io.onBatch(() => blk.publish());
    return blk;
  }

  attach(machine: FuzzMachine): void {
    this.#machine = machine;
    machine.onPop = (chain) => this.#permit(chain);
    this.#files.io.onMemory = (gpa, length, stored) => {
      // After a reset the vCPUs are held for what goes on.
      if (!this.held) machine.checkIo(gpa, length, stored);
    };
  }

  get held(): boolean {
    return this.#holds > 0;
  }

  queue(): number {
    return 0;
  }

  request(random: Random): Request {
    const { VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID } = abi;
    const kind = random.below(100);
    const count = random.chance(90) ? 1 + random.below(random.chance(70) ? 4 : 40) : random.below(300);
    const last = SECTORS - count;
    const sector = random.chance(90)
      ? random.below(Math.max(1, last + 1))
      : random.pick([last, last + 1, SECTORS, 2 ** 32, 2 ** 53, 2n ** 55n, 2n ** 64n - 1n, 2n ** 64n - BigInt(count)]);
    const at = BigInt.asUintN(64, BigInt(sector));
    const bytes = count * SECTOR + (random.chance(95) ? 0 : random.below(600));
    const status = random.chance(97) ? 1 : random.below(3);
    if (kind < 30) return { out: header(VIRTIO_BLK_T_IN, at), in: bytes + status };
    if (kind < 65) {
      const data = new Uint8Array(bytes).fill(random.u32());
      return { out: Buffer.concat([header(VIRTIO_BLK_T_OUT, at), data]), in: status };
    }
    if (kind < 72) return { out: header(VIRTIO_BLK_T_FLUSH, at), in: status };
    if (kind < 76)
      return { out: header(VIRTIO_BLK_T_GET_ID), in: (random.chance(80) ? 20 : random.below(40)) + status };
    if (kind < 96) {
      const ranges = Array.from({ length: random.chance(90) ? 1 + random.below(3) : random.below(18) }, () => {
        const sectors = random.chance(93) ? random.below(count + 1) : random.u32();
        const from = random.chance(60) ? random.below(SECTORS) : at;
        return range(from, sectors, random.chance(90) ? random.below(2) : random.u32());
      });
      const type = random.pick([abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES]);
      const cut = random.chance(95) ? 0 : random.below(16);
      const out = Buffer.concat([header(type), ...ranges]);
      return { out: out.subarray(0, out.length - Math.min(cut, out.length)), in: status };
    }
    return { out: random.fill(new Uint8Array(random.below(64))), in: random.below(64) };
  }

  hostEvent(random: Random): string {
    return `${this.#files.io.finishSome(random, 1 + random.below(8))} operations end`;
  }

  settle(): boolean {
    this.#files.io.finishAll();
    return false;
  }

  serves(): boolean {
    return true;
  }

  probe({ driver }: FuzzMachine): void {
    const { io } = this.#files;
    if (this.#holds > 0 || io.pending > 0) throw new Error('the disk was not let go');
    io.failing = false;
    driver.initialize({ queueSizes: [16] });
    const [queue] = driver.queues;
    const ask = (...buffers: (Uint8Array | number)[]) => {
      queue?.send(buffers);
      io.finishAll();
      const done = queue?.completions() ?? [];
      if (done.length !== 1) throw new Error(`${done.length} requests were completed`);
      return done[0]?.data as Uint8Array;
    };
    const data = PATTERN.subarray(7, 7 + 3 * SECTOR);
    const [status] = ask(header(abi.VIRTIO_BLK_T_OUT, 9), data, 1);
    if (this.device.disk.readOnly) {
      if (status === OK) throw new Error('a read-only disk was written');
      return;
    }
    // A flush that has failed once fails for ever; a write-through disk needs none.
    if (status !== OK) throw new Error(`writing: status ${status}`);
    const back = ask(header(abi.VIRTIO_BLK_T_IN, 9), 3 * SECTOR, 1);
    if (back.at(-1) !== OK || !same(back.subarray(0, -1), data)) throw new Error('the disk forgot what was written');
  }

  end(): void {
    this.#files.check(this.#permitted);
  }

  /** Notes what a request may change, by the words of the specification. */
  #permit({ readable, writable }: DescriptorChain): void {
    if (writable.length === 0) return;
    const bytes = new Uint8Array(Math.min(readable.length, 16 + 16 * RANGE.sizeof));
    let at = 0;
    for (let i = 0; i < readable.count && at < bytes.length; i++) {
      const [gpa, length] = [readable.pairs[2 * i] as number, readable.pairs[2 * i + 1] as number];
      const part = bytes.subarray(at, at + length);
      this.#files.memory.guest.read(gpa, part);
      at += part.length;
    }
    if (bytes.length < 16) return;
    const view = new DataView(bytes.buffer);
    const type = view.getUint32(0, true);
    if (type === abi.VIRTIO_BLK_T_OUT) {
      this.#allow(view.getBigUint64(8, true), BigInt(readable.length - 16) / BigInt(SECTOR));
    } else if (type === abi.VIRTIO_BLK_T_DISCARD || type === abi.VIRTIO_BLK_T_WRITE_ZEROES) {
      for (let n = 16; n + 16 <= bytes.length; n += 16) {
        this.#allow(view.getBigUint64(n, true), BigInt(view.getUint32(n + 8, true)));
      }
    }
  }

  #allow(sector: bigint, count: bigint): void {
    if (sector + count > SECTORS) return;
    this.#permitted.fill(1, Number(sector), Number(sector + count));
  }

  #checkChange({ fd, offset, length }: Change): void {
    const { image, overlay } = this.#files;
    if (this.device.disk.readOnly) this.#machine?.fail('a read-only disk is written');
    if (fd !== (overlay ?? image).fd) this.#machine?.fail(`descriptor ${fd} is written`);
    const [start, end] = overlay ? [overlay.bitmapOffset, overlay.dataOffset + SIZE] : [0, SIZE];
    if (!(offset >= start && offset + length <= end)) this.#machine?.fail(`${length} bytes are written at ${offset}`);
  }
}

function readAll(fd: number, offset: number, length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  return bytes.subarray(0, readSync(fd, bytes, 0, length, offset));
}

function same(one: Uint8Array, other: Uint8Array): boolean {
  return Buffer.compare(one, other) === 0;
}

function target(name: string, withOverlay: boolean): Target {
  const files = new PerMemory((memory) => new Files(memory, withOverlay));
  return {
    name,
    limits: { accesses: 64 * 256 * 8 + 20_000, bytes: 1 << 20 },
    subject: (random, memory) => new BlkSubject(random, files.get(memory)),
    dispose: () => files.dispose(),
  };
}

export const blkRaw = target('blk-raw', false);
export const blkOverlay = target('blk-overlay', true);
