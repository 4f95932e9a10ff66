import type { ArgumentsCamelCase, Argv } from 'yargs';

/** What a command's file exports. */
interface CommandModule<T> {
  builder(yargs: Argv): Argv<T>;
  handler(args: ArgumentsCamelCase<T>): void | Promise<void>;
}

/** What a parser throws when it has found which command is to run. If it ran it itself, it would also render its help. */
export class Chosen {
  readonly run: () => void | Promise<void>;

  constructor(run: () => void | Promise<void>) {
    this.run = run;
  }
}

/** A command as the help lists it; its file is loaded only when it is the one that runs. */
export interface Command {
  /** Name and positional arguments, as yargs writes them. */
  readonly usage: string;
  readonly describe: string;
  /** Loads the command's file and tells a parser of its options. It then throws Chosen instead of running the command. */
  register(parser: Argv): Promise<Argv>;
  /** Loads it and tells a parser, for nothing else, of its options and positional arguments. */
  declare(parser: Argv): Promise<void>;
}

function lazily<T>(usage: string, describe: string, load: () => Promise<CommandModule<T>>): Command {
  return {
    usage,
    describe,
    register: async (parser) => {
      const { builder, handler } = await load();
      return parser.command(usage, describe, builder, (args) => {
        throw new Chosen(() => handler(args));
      });
    },
    declare: async (parser) => {
      const { builder } = await load();
      builder(parser);
    },
  };
}

/** Every command, in the order of the help. */
export const COMMANDS: readonly Command[] = [
  lazily(
    'run',
    'Boot a Linux guest: with this terminal as its console, in the background, or for one command',
    () => import('./run.js'),
  ),
  lazily('ps', 'List the machines that have a name', () => import('./ps.js')),
  lazily('exec <name> [command..]', 'Run a command in a machine', () => import('./exec.js')),
  lazily('shell <name>', 'Start a shell in a machine', () => import('./shell.js')),
  lazily('cp <source> <target>', 'Copy files into a machine or out of it', () => import('./cp.js')),
  lazily('console <name>', 'Join the console of a machine', () => import('./console.js')),
  lazily('logs <name>', 'Print what the console of a machine said', () => import('./logs.js')),
  lazily('snapshot <name> <folder>', 'Save a machine as it is now', () => import('./snapshot.js')),
  lazily(
    'restore <folder>',
    'Let a machine go on from a snapshot: on this terminal, in the background, or for one command',
    () => import('./restore.js'),
  ),
  lazily(
    'clone <source>',
    'Start machines that go on from a snapshot, or from where a machine is now',
    () => import('./clone.js'),
  ),
  lazily('migrate <name> <address>', 'Move a machine to another process, while it runs', () => import('./migrate.js')),
  lazily('receive <address>', 'Wait for a machine that migrate moves here', () => import('./receive.js')),
  lazily('stop <name>', 'End a machine', () => import('./stop.js')),
  lazily('doctor', 'Say what this host offers, and what to do about each lack', () => import('./doctor.js')),
  lazily('kernel <action> [flavour]', 'Build, list or locate guest kernels', () => import('./kernel.js')),
  lazily('initramfs <action>', 'Build or locate the default initramfs', () => import('./initramfs.js')),
  lazily('rootfs <action>', 'Build or locate the default root file system, an ext4 image', () => import('./rootfs.js')),
  lazily('completion <shell>', 'Print a script that completes command lines', () => import('./completion.js')),
];

/** The first word of a command's usage. */
export function nameOf({ usage }: Command): string {
  return usage.split(' ', 1)[0] as string;
}
