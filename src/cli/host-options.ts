import type { Argv } from 'yargs';
import { LOG_LEVELS } from './log.js';

/** The options that every command has whose process has a machine. */
export function hostOptions<T>(yargs: Argv<T>) {
  return yargs
    .option('name', {
      type: 'string',
      requiresArg: true,
      describe: 'a name, by which exec, shell, cp, console, logs, snapshot and stop find the machine',
    })
    .option('detach', {
      alias: 'd',
      type: 'boolean',
      default: false,
      describe: 'run in the background: print the name and return when the guest runs',
    })
    .option('json', { type: 'boolean', default: false, describe: 'with --detach: one JSON object on stdout' })
    .option('stats', { type: 'string', requiresArg: true, describe: 'write timings and counters as JSON to this file' })
    .option('timeout', { type: 'string', requiresArg: true, describe: 'end the machine after this many seconds' })
    .option('log-level', { choices: LOG_LEVELS, default: 'silent' as const, describe: 'structured log on stderr' });
}
