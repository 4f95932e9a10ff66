import type { MigrationProgress } from '../migration/options.js';
import { formatSize } from './size.js';

const BAR = 20;

/** How far a migration is, as a person is told. */
export function migrationProgress({ phase, round, bytesSent, bytesRemaining }: MigrationProgress): string {
  if (phase === 'connect') return 'connecting';
  if (phase === 'confirm') return 'waiting for the other side';
  const sent = `${formatSize(bytesSent)} copied`;
  if (phase === 'stop-and-copy') return `the last of it, ${sent}`;
  if (bytesRemaining === 0) return `round ${round}, ${sent}`;
  const filled = Math.floor((BAR * bytesSent) / (bytesSent + bytesRemaining));
  return `[${'#'.repeat(filled)}${'.'.repeat(BAR - filled)}] round ${round}, ${sent}, ${formatSize(bytesRemaining)} to go`;
}
