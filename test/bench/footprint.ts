import { readdirSync, readFileSync } from 'node:fs';

/** What some processes have of the host at one moment. */
export interface Footprint {
  /** Bytes of memory that is not guest RAM: its share (PSS) and what is resident (RSS). */
  readonly pss: number;
  readonly rss: number;
  /** Bytes of guest RAM that are in memory for these processes: their share. */
  readonly guestPss: number;
  readonly descriptors: number;
  readonly threads: number;
  /** Milliseconds of processor time, with that of KVM's own threads for them. */
  readonly cpu: number;
}

/** @param guestFile part of the path of files with guest RAM. Guest RAM is also what huge pages are asked for. */
export function footprint(processes: readonly number[], guestFile = '/memory'): Footprint {
  const total = { pss: 0, rss: 0, guestPss: 0, descriptors: 0, threads: 0, cpu: 0 };
  for (const pid of processes) {
    const smaps = readFileSync(`/proc/${pid}/smaps`, 'latin1');
    // A mapping is a line with its addresses, perhaps a path, and then fields.
    for (const mapping of smaps.split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m)) {
      const size = (name: string) => Number(new RegExp(`^${name}:\\s*(\\d+) kB`, 'm').exec(mapping)?.[1] ?? 0) * 1024;
      const [head = ''] = mapping.split('\n', 1);
      if (/^VmFlags:.* hg\b/m.test(mapping) || head.includes(guestFile)) total.guestPss += size('Pss');
      else {
        total.pss += size('Pss');
        total.rss += size('Rss');
      }
    }
    total.descriptors += readdirSync(`/proc/${pid}/fd`).length;
    total.threads += readdirSync(`/proc/${pid}/task`).length;
    total.cpu += cpuTime(`/proc/${pid}/task`, readdirSync(`/proc/${pid}/task`));
  }
  const names = new Set(processes.map((pid) => `kvm-pit/${pid}`));
  const own = readdirSync('/proc').filter((pid) => /^\d+$/.test(pid) && names.has(commandOf(pid)));
  return { ...total, cpu: total.cpu + cpuTime('/proc', own) };
}

function cpuTime(folder: string, tasks: readonly string[]): number {
  let nanoseconds = 0;
  for (const task of tasks) {
    try {
      nanoseconds += Number(readFileSync(`${folder}/${task}/schedstat`, 'latin1').split(' ')[0]);
    } catch {
      // it has ended
    }
  }
  return nanoseconds / 1e6;
}

function commandOf(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'latin1').trim();
  } catch {
    return '';
  }
}
