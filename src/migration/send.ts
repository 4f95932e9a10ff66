import { randomBytes } from 'node:crypto';
import { cpus, release } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, TsvisorError } from '../errors.js';
import type { ResolvedConfig } from '../machine/config.js';
import { checkFields, type FieldsOf } from '../machine/fields.js';
import { PAGE_SIZE } from '../machine/layout.js';
import type { PageBatch, PagesStep } from '../machine/messages.js';
import type { ThreadLink } from '../machine/thread-link.js';
import { packageVersion } from '../package-version.js';
import { captureDisks } from '../snapshot/disks.js';
import { isUnchanged } from '../snapshot/file-reference.js';
import { type DiskCapture, encodeState, type SnapshotState } from '../snapshot/format.js';
import { bootFiles } from '../snapshot/take.js';
import { StateReader } from '../state-reader.js';
import { type Address, parseAddress } from './address.js';
import { FrameChannel, Refusal, unversioned } from './channel.js';
import { FrameType, versioned } from './frames.js';
import {
  checkMilliseconds,
  DEFAULT_DOWNTIME,
  DEFAULT_TIMEOUT,
  type MigrateOptions,
  type MigrationProgress,
  type MigrationResult,
} from './options.js';
import { outcome } from './outcome.js';
import { isAlive, type ProcessIdentity, readIdentity } from './process-identity.js';
import { connectSecurely, keyBytes } from './secure.js';
import { stages } from './stages.js';

/** Rounds after which the guest is stopped whatever it writes. */
const MAX_ROUNDS = 30;
/** A round makes progress when it leaves less than this part of what the best before it left. */
const PROGRESS = 0.9;
/** Rounds without progress after which the guest is stopped. */
const FUTILE_ROUNDS = 3;
/** Of maxDowntime, the part that memory may take; the rest is for the disks and the target. */
const MEMORY_SHARE = 0.5;
/** Milliseconds between attempts to get the disks back from a target that is letting go of them. */
const TAKE_BACK_PAUSE = 50;

const FIELDS: FieldsOf<MigrateOptions> = {
  key: true,
  timeout: true,
  onProgress: true,
  signal: true,
  maxDowntime: true,
};

/** What is known of the machine that is moved. */
export interface MigrationSource {
  readonly link: Pick<ThreadLink, 'request' | 'over' | 'ended'>;
  readonly config: ResolvedConfig;
  /** What can be given to a machine again, without functions. */
  readonly portable: object;
  /** It stays stopped: nobody knows whether the target runs it. */
  undecided(): void;
  /** It has moved to another process of this host, with files that were its own. */
  leaveFiles(): void;
}

/**
 * Moves a machine to a target. When this resolves the machine has ended here.
 * @throws MigrationError, when it goes on here, or when it is paused since nobody knows whether the target runs it
 */
export async function migrateMachine(
  source: MigrationSource,
  address: string,
  options: MigrateOptions,
): Promise<MigrationResult> {
  checkFields(options, 'options', FIELDS);
  const { timeout = DEFAULT_TIMEOUT, maxDowntime = DEFAULT_DOWNTIME, signal } = options;
  const migration = new Migration(source, {
    address: parseAddress(address),
    psk: keyBytes(options.key),
    timeout: checkMilliseconds('timeout', timeout),
    maxDowntime: checkMilliseconds('maxDowntime', maxDowntime, 1),
    signal,
    onProgress: options.onProgress,
  });
  signal?.throwIfAborted();
  try {
    return await migration.run();
  } catch (error) {
    if (error === signal?.reason) throw error;
    if (source.link.over) throw error; // it has ended meanwhile
    const { message } = error as Error;
    const why = error instanceof Refusal ? `the target refused: ${message}` : message;
    throw new MigrationError(`migration: ${why}`, { cause: error });
  }
}

interface Settings {
  readonly address: Address;
  readonly psk: Buffer;
  readonly timeout: number;
  readonly maxDowntime: number;
  readonly signal: AbortSignal | undefined;
  readonly onProgress: ((progress: MigrationProgress) => void) | undefined;
}

class Migration {
  readonly #source: MigrationSource;
  readonly #settings: Settings;
  readonly #id = randomBytes(16).toString('hex');
  readonly #began = performance.now();
  #phase: MigrationProgress['phase'] = 'connect';
  #round = 0;
  #bytes = 0;
  #dirtyRate: number | undefined;
  /** Milliseconds in which those bytes were sent. */
  #sending = 0;
  #stopped = 0;
  #target: ProcessIdentity | undefined;
  /** As the guest left them. */
  #disks: readonly DiskCapture[] = [];

  constructor(source: MigrationSource, settings: Settings) {
    this.#source = source;
    this.#settings = settings;
  }

  async run(): Promise<MigrationResult> {
    const { address, psk, timeout, signal } = this.#settings;
    this.#report(0);
    const channel = new FrameChannel(await connectSecurely(address, psk, timeout), timeout);
    const abort = () => channel.destroy(signal?.reason);
    signal?.addEventListener('abort', abort, { once: true });
    try {
      signal?.throwIfAborted();
      await this.#greet(channel);
      await this.#preCopy(channel);
      await this.#stopAndCopy(channel);
    } catch (error) {
      await channel.refuse('the source gave up');
      await this.#goOn();
      throw error;
    } finally {
      signal?.removeEventListener('abort', abort);
    }
    return this.#confirm(channel);
  }

  async #greet(channel: FrameChannel): Promise<void> {
    const disks = await captureDisks(this.#source.config.drives, 'reference', '');
    const boot = bootFiles(this.#source.config);
    const state = encodeState({ ...this.#describe(disks), ...(boot && { boot }) });
    await channel.send(FrameType.hello, versioned(state));
    const { payload } = await channel.next(FrameType.accept);
    this.#target = readIdentity(new StateReader(parse(unversioned(payload)), ''));
    await stages.reached('source: accepted');
  }

  /** Copies memory while the guest runs, until the rest fits into the downtime or more rounds are of no use. */
  async #preCopy(channel: FrameChannel): Promise<void> {
    const { maxDowntime } = this.#settings;
    this.#phase = 'pre-copy';
    let { remaining } = await this.#pages('begin');
    let best = Number.POSITIVE_INFINITY;
    let futile = 0;
    while (this.#round < MAX_ROUNDS && futile < FUTILE_ROUNDS) {
      this.#round++;
      const began = performance.now();
      await this.#sendRound(channel, remaining);
      await stages.reached('source: round sent');
      ({ remaining } = await this.#pages('round'));
      this.#dirtyRate = (remaining * 1000) / (performance.now() - began);
      const rate = this.#bytes / this.#sending;
      if (remaining * PAGE_SIZE <= rate * maxDowntime * MEMORY_SHARE) return;
      futile = remaining < best * PROGRESS ? 0 : futile + 1;
      best = Math.min(best, remaining);
    }
  }

  async #stopAndCopy(channel: FrameChannel): Promise<void> {
    const { link, config } = this.#source;
    this.#phase = 'stop-and-copy';
    this.#stopped = performance.now();
    await link.request({ command: 'hold' });
    await stages.reached('source: held');
    const { state, saved } = await link.request({ command: 'save' });
    if (!saved) throw new TsvisorError('ERR_INTERNAL', 'the machine thread saved nothing');
    const { remaining } = await this.#pages('round');
    await this.#sendRound(channel, remaining);
    await link.request({ command: 'handOver' });
    await stages.reached('source: disks handed over');
    const disks = await captureDisks(config.drives, 'reference', '');
    this.#disks = disks;
    const whole = encodeState({ ...this.#describe(disks), machine: saved.machine });
    await channel.send(FrameType.state, Buffer.concat([Uint8Array.of(state === 'paused' ? 1 : 0), whole]));
    await stages.reached('source: state sent');
    await channel.next(FrameType.ready);
    await stages.reached('source: ready heard');
    this.#phase = 'confirm';
    this.#report(0); // here, where what it throws is only the end of the migration
    this.#settings.signal?.throwIfAborted();
  }

  /** The machine is the target's once it has heard so. Until it says what became of it, it does not run here. */
  async #confirm(channel: FrameChannel): Promise<MigrationResult> {
    const { link, undecided } = this.#source;
    const { address, psk, timeout } = this.#settings;
    let refusal: Error | undefined;
    let running: boolean | undefined;
    try {
      await channel.sendNow(FrameType.commit);
      await stages.reached('source: commit sent');
      await channel.next(FrameType.running);
      running = true;
    } catch (error) {
      channel.destroy();
      refusal = error as Error;
      const target = this.#target as ProcessIdentity;
      running = error instanceof Refusal ? false : await outcome({ address, psk, timeout, target, id: this.#id });
    }
    // A target that is gone may have begun to run it: then the guest's memory here is older than its disks.
    const written = running === false && this.#disks.some(({ files }) => !files.every(isUnchanged));
    if (running === undefined || written) {
      await link.request({ command: 'pause' });
      await this.#pages('end');
      undecided();
      const why = written
        ? 'the target is gone, but the machine has run there and written its disks; it'
        : 'the target cannot be asked whether it runs the machine, which';
      const remedy = 'stop() it if it runs there, resume() it only if it does not and never will';
      throw new MigrationError(`${why} is paused here: ${remedy}`, { cause: refusal });
    }
    if (!running) {
      await this.#goOn();
      throw refusal as Error;
    }
    const now = performance.now();
    const result = {
      downtimeMs: now - this.#stopped,
      totalMs: now - this.#began,
      rounds: this.#round,
      bytes: this.#bytes,
    };
    if (isAlive(this.#target as ProcessIdentity) !== undefined) this.#source.leaveFiles();
    await stages.reached('source: running heard');
    await link.request({ command: 'migrated' }).catch(() => {}); // it has ended, so or otherwise
    await link.ended.catch(() => {});
    channel.send(FrameType.done).then(
      () => channel.end(),
      () => {},
    );
    return result;
  }

  /** Sends the pages of a round, and waits until the target has them. */
  async #sendRound(channel: FrameChannel, pages: number): Promise<void> {
    const began = performance.now();
    let remaining = pages;
    // The next batch is made while one is sent.
    let next = remaining > 0 ? this.#pages('more') : undefined;
    while (next) {
      const { payload, remaining: rest } = await next;
      remaining = rest;
      next = remaining > 0 ? this.#pages('more') : undefined;
      next?.catch(() => {}); // whoever awaits it hears
      this.#bytes += payload?.length ?? 0;
      await channel.send(FrameType.pages, payload);
      this.#report(remaining * PAGE_SIZE);
    }
    await channel.send(FrameType.round);
    await channel.next(FrameType.round);
    this.#sending += performance.now() - began;
  }

  async #pages(step: PagesStep): Promise<PageBatch> {
    const { pages } = await this.#source.link.request({ command: 'pages', pages: step });
    if (!pages) throw new TsvisorError('ERR_INTERNAL', 'the machine thread gave no pages');
    return pages;
  }

  /** The machine goes on here, as it was; once its disks are its own again, which a target that dies lets go of. */
  async #goOn(): Promise<void> {
    const { link } = this.#source;
    while (!link.over) {
      try {
        await link.request({ command: 'release' });
        await link.request({ command: 'pages', pages: 'end' });
        return;
      } catch (error) {
        if (!(error instanceof TsvisorError) || error.code !== 'ERR_DRIVE') return; // it has ended, or was reset
        await sleep(TAKE_BACK_PAUSE);
      }
    }
  }

  #describe(disks: SnapshotState['disks']): SnapshotState {
    const { config, portable } = this.#source;
    return {
      id: this.#id,
      created: new Date().toISOString(),
      host: { cpu: cpus()[0]?.model ?? '', kernel: release(), tsvisor: packageVersion() },
      config: portable,
      disks,
      memory: { size: config.memory },
      machine: {} as SnapshotState['machine'],
    };
  }

  #report(bytesRemaining: number): void {
    const { onProgress } = this.#settings;
    if (!onProgress) return;
    const rate = this.#dirtyRate;
    onProgress({
      phase: this.#phase,
      round: this.#round,
      bytesSent: this.#bytes,
      bytesRemaining,
      ...(rate !== undefined && { dirtyPagesPerSecond: Math.round(rate) }),
    });
  }
}

function parse(bytes: Buffer): object {
  try {
    const value: unknown = JSON.parse(bytes.toString());
    if (typeof value === 'object' && value !== null) return value;
  } catch {
    // said below
  }
  throw new MigrationError('the other side sent no JSON');
}
