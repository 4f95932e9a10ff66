import { statSync } from 'node:fs';
import { basename, join, posix, resolve } from 'node:path';
import type { ArgumentsCamelCase, Argv } from 'yargs';
import type { Agent } from '../agent/agent.js';
import type { CopyOptions, CopySummary } from '../agent/copy.js';
import { GuestError, TsvisorError, UsageError } from '../errors.js';
import { agentOf } from './machines/agent-client.js';
import { checkName } from './machines/machine-folder.js';
import { Progress } from './progress.js';
import { abortOnSignals } from './signals.js';
import { formatSize } from './size.js';

export function builder(yargs: Argv) {
  return yargs
    .positional('source', { type: 'string', demandOption: true, describe: 'PATH of this host, or NAME:PATH' })
    .positional('target', { type: 'string', demandOption: true, describe: 'the other of the two' })
    .example('$0 cp site web:/srv', 'a file or a tree; into /srv if that is a folder, else as /srv')
    .example('$0 cp web:/var/log/app.log .', 'out of the guest')
    .example('$0 cp site/. web:/srv', 'what is in a folder')
    .epilogue('Modes, times and links are kept. A path of this host with a colon in it is written ./a:b.');
}

type CpArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler({ source, target }: CpArguments): Promise<void> {
  const from = parsePlace(source);
  const to = parsePlace(target);
  const name = from.machine ?? to.machine;
  if (name === undefined || (from.machine !== undefined && to.machine !== undefined)) {
    throw new UsageError('cp: one of the two, and only one, is in a machine: write it NAME:PATH');
  }
  if (from.machine === undefined) statSync(from.path, { throwIfNoEntry: false }) ?? missing(source);
  using interrupt = abortOnSignals();
  const { signal } = interrupt;
  const agent = await agentOf(name, signal);
  using progress = new Progress(`copying ${source}`);
  const options: CopyOptions = {
    signal,
    onProgress: ({ files, bytes, path }) => progress.update(`${path || source}: ${files} files, ${formatSize(bytes)}`),
  };
  const copy = from.machine === undefined ? copyIn : copyOut;
  const { skipped } = await copy(agent, from.path, to.path, options).catch(hostError);
  progress[Symbol.dispose]();
  if (skipped > 0) process.stderr.write(`tsvisor: ${skipped} devices, sockets or FIFOs were left out\n`);
}

async function copyIn(agent: Agent, from: string, to: string, options: CopyOptions): Promise<CopySummary> {
  const target = posix.resolve('/', to);
  const into = !contentsOnly(from) && (to.endsWith('/') || (await isGuestFolder(agent, target, options.signal)));
  return await agent.fs.copyIn(resolve(from), into ? posix.join(target, basename(resolve(from))) : target, options);
}

async function copyOut(agent: Agent, from: string, to: string, options: CopyOptions): Promise<CopySummary> {
  const source = posix.resolve('/', from);
  const isFolder = statSync(to, { throwIfNoEntry: false })?.isDirectory() ?? to.endsWith('/');
  const into = isFolder && !contentsOnly(from) && source !== '/';
  return await agent.fs.copyOut(source, into ? join(resolve(to), posix.basename(source)) : resolve(to), options);
}

/** As cp has it: `folder/.` is what is in the folder. */
function contentsOnly(path: string): boolean {
  return path === '.' || path.endsWith('/.');
}

async function isGuestFolder(agent: Agent, path: string, signal: AbortSignal | undefined): Promise<boolean> {
  try {
    return (await agent.fs.stat(path, signal ? { signal } : {})).type === 'directory';
  } catch (error) {
    if (error instanceof GuestError && error.errno === 'ENOENT') return false;
    throw error;
  }
}

interface Place {
  readonly machine?: string;
  readonly path: string;
}

/** A path with a slash before its first colon is one of this host. @throws UsageError */
function parsePlace(text: string): Place {
  const colon = text.indexOf(':');
  if (colon < 0 || text.slice(0, colon).includes('/')) return { path: text };
  const path = text.slice(colon + 1);
  if (path === '') throw new UsageError(`cp: ${text} has no path; write ${text}/ for the root of its files`);
  return { machine: checkName(text.slice(0, colon)), path };
}

/** @throws TsvisorError ERR_OUTPUT for what this host's files refuse. */
function hostError(error: unknown): never {
  const refused = error instanceof Error && 'syscall' in error && 'errno' in error;
  throw refused ? new TsvisorError('ERR_OUTPUT', `cp: ${error.message}`) : error;
}

function missing(path: string): never {
  throw new UsageError(`cp: there is no file ${path}`);
}
