/** The programs that a bench compares tsvisor with; `host` is the same program without a machine around it. */
export type Peer = 'c' | 'node' | 'host' | 'qemu' | 'kvmtool' | 'firecracker';

/** Everything that a bench measured for one thing: a sample for each time it was done. */
export interface Measurement {
  readonly name: string;
  readonly unit: string;
  readonly better: 'lower' | 'higher';
  readonly tsvisor: readonly number[];
  readonly peers: Readonly<Partial<Record<Peer, readonly number[]>>>;
  /** Why peers that belong here have no samples. */
  readonly absent?: Readonly<Partial<Record<Peer, string>>>;
}

/** What a measurement comes to: medians, tsvisor's over each peer's, and between which two the middle half lies. */
export interface Row {
  readonly name: string;
  readonly unit: string;
  readonly better: 'lower' | 'higher';
  readonly tsvisor: number;
  readonly peers: Readonly<Partial<Record<Peer, number>>>;
  readonly ratio: Readonly<Partial<Record<Peer, number>>>;
  readonly quartiles: Readonly<Partial<Record<'tsvisor' | Peer, readonly [number, number]>>>;
  readonly absent?: Readonly<Partial<Record<Peer, string>>>;
}

/** Where the numbers are from. */
export interface HostFacts {
  readonly cpu: string;
  readonly cores: number;
  readonly kernel: string;
  readonly kvm: string;
  readonly node: string;
  /** Load averages when the bench began: 1, 5 and 15 minutes. */
  readonly load: readonly number[];
}

/** What `--json` prints. */
export interface BenchReport {
  readonly bench: string;
  readonly host: HostFacts;
  readonly rows: readonly Row[];
}

export interface BenchOptions {
  /** How often each contestant has its turn. */
  readonly rounds?: number | undefined;
  /** How many machines share the host where that is what a bench is about. */
  readonly machines?: number | undefined;
  /** A snapshot of a booted guest with an agent, for benches that need one: without it they boot the default guest. */
  readonly snapshot?: string | undefined;
  /** Receives what a person should know and a table does not say; may be called often. */
  readonly note: (text: string) => void;
}

/** One bench: a file of this folder, and a line in main.ts. */
export interface Bench {
  readonly name: string;
  /** One line for the list of benches. */
  readonly describe: string;
  run(options: BenchOptions): Promise<Measurement[]>;
}

/** The value below which the given part (0 to 1) of the samples lies, interpolated. @throws RangeError without samples. */
export function quantile(samples: readonly number[], part: number): number {
  if (samples.length === 0) throw new RangeError('there are no samples');
  const sorted = [...samples].sort((a, b) => a - b);
  const at = part * (sorted.length - 1);
  const low = sorted[Math.floor(at)] as number;
  const high = sorted[Math.ceil(at)] as number;
  return low + (high - low) * (at - Math.floor(at));
}

export function median(samples: readonly number[]): number {
  return quantile(samples, 0.5);
}

/** Four significant digits: more would be noise. */
export function rounded(value: number): number {
  return Number(value.toPrecision(4));
}

/** The ratios are of the medians themselves, not of the rounded ones. */
export function rowOf({ name, unit, better, tsvisor, peers, absent }: Measurement): Row {
  const ours = median(tsvisor);
  const medians = Object.entries(peers).map(([peer, samples]) => [peer, median(samples)] as const);
  return {
    name,
    unit,
    better,
    tsvisor: rounded(ours),
    peers: Object.fromEntries(medians.map(([peer, value]) => [peer, rounded(value)])),
    // Nothing is to be had of one that is 0.
    ratio: Object.fromEntries(
      medians.filter(([, value]) => value !== 0).map(([peer, value]) => [peer, rounded(ours / value)]),
    ),
    quartiles: Object.fromEntries(
      Object.entries({ tsvisor, ...peers }).map(([who, samples]) => [
        who,
        [rounded(quantile(samples, 0.25)), rounded(quantile(samples, 0.75))],
      ]),
    ),
    ...(absent && { absent }),
  };
}

/** For a person: medians, in brackets the quartiles, and the ratios. */
export function tableOf(measurements: readonly Measurement[]): string {
  const peers = [...new Set(measurements.flatMap(({ peers }) => Object.keys(peers) as Peer[]))];
  const head = ['', 'unit', 'tsvisor', ...peers, ...peers.map((peer) => `to ${peer}`)];
  const body = measurements.map((measurement) => {
    const { name, unit, better, ratio } = rowOf(measurement);
    return [
      name,
      `${unit}, ${better} is better`,
      withSpread(measurement.tsvisor),
      ...peers.map((peer) => withSpread(measurement.peers[peer])),
      ...peers.map((peer) => (ratio[peer] === undefined ? '-' : `${ratio[peer].toFixed(3)} x`)),
    ];
  });
  return aligned([head, ...body]) + absences(measurements);
}

/** A line for each peer that is missing and its reason, with the rows that miss it. */
function absences(measurements: readonly Measurement[]): string {
  const rows = new Map<string, string[]>();
  for (const { name, absent = {} } of measurements) {
    for (const [peer, reason] of Object.entries(absent)) {
      const line = `no ${peer} (${reason})`;
      rows.set(line, [...(rows.get(line) ?? []), name]);
    }
  }
  return [...rows].map(([line, names]) => `${line}: ${names.join('; ')}\n`).join('');
}

function withSpread(samples: readonly number[] | undefined): string {
  if (!samples || samples.length === 0) return '-';
  const [low, middle, high] = [0.25, 0.5, 0.75].map((part) => rounded(quantile(samples, part)));
  return `${middle} [${low} .. ${high}]`;
}

/** Columns two spaces apart: the first two to the left, figures to the right. */
function aligned(lines: readonly (readonly string[])[]): string {
  const widths = (lines[0] ?? []).map((_, column) => Math.max(...lines.map((line) => (line[column] ?? '').length)));
  const cell = (text: string, column: number) => {
    const width = widths[column] ?? 0;
    return column < 2 ? text.padEnd(width) : text.padStart(width);
  };
  return lines.map((line) => `${line.map(cell).join('  ').trimEnd()}\n`).join('');
}
