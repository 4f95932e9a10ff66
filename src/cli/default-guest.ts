import { flavourFor, initramfsPath, kernelPath, namesRoot } from '../machine/default-guest.js';

interface Images {
  readonly kernel?: string | undefined;
  readonly initrd?: string | undefined;
  readonly append?: string | undefined;
  readonly cpus: number;
}

/** Builds what the machine needs of the default guest and is not in the cache, with progress on stderr. */
export async function buildDefaultGuest(args: Images): Promise<void> {
  if (args.kernel !== undefined) return;
  await kernelPath(flavourFor(args.cpus));
  if (args.initrd === undefined && !namesRoot(args.append)) await initramfsPath();
}
