import type { MachineOptions } from '../machine/machine.js';

export const LOG_LEVELS = ['silent', 'warn', 'info', 'debug'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

/** A structured log on stderr. pino is loaded only when somebody asked for one. */
export async function createLog(level: LogLevel): Promise<MachineOptions> {
  if (level === 'silent') return {};
  const { pino } = await import('pino');
  const logger = pino({ level, base: null }, pino.destination({ dest: 2, sync: true }));
  return { onLog: (at, message) => logger[at](message) };
}
