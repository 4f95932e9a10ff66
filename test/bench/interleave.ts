/** Does the thing once and gives the samples of it. */
export type Contestant = () => number[] | Promise<number[]>;

/**
 * Lets every contestant have its turn in each round, another one first each time, so that whatever else the host does
 * and whatever a predecessor leaves behind hits all of them alike.
 * @returns all samples of each.
 */
export async function interleave<Name extends string>(
  rounds: number,
  contestants: Readonly<Partial<Record<Name, Contestant>>>,
): Promise<Partial<Record<Name, number[]>>> {
  const entries = Object.entries(contestants) as [Name, Contestant][];
  const samples: Partial<Record<Name, number[]>> = {};
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < entries.length; turn++) {
      const [name, contestant] = entries[(round + turn) % entries.length] as [Name, Contestant];
      samples[name] = [...(samples[name] ?? []), ...(await contestant())];
    }
  }
  return samples;
}

/** Has each do the thing once, which does not count. @returns those that can, and why the others cannot. */
export async function whoCan<Name extends string, Does extends () => unknown>(
  contestants: Readonly<Partial<Record<Name, Does>>>,
): Promise<{ able: Partial<Record<Name, Does>>; absent: Partial<Record<Name, string>> }> {
  const able: Partial<Record<Name, Does>> = {};
  const absent: Partial<Record<Name, string>> = {};
  for (const [name, does] of Object.entries(contestants) as [Name, Does][]) {
    try {
      await does();
      able[name] = does;
    } catch (error) {
      absent[name] = error instanceof Error ? error.message : String(error);
    }
  }
  return { able, absent };
}
