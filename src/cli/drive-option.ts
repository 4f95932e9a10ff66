import { UsageError } from '../errors.js';
import type { DriveConfig } from '../machine/device-config.js';

const CACHES = ['writeback', 'none', 'unsafe'] as const;
const SYNTAX = 'file=FILE[,readonly][,cache=writeback|none|unsafe][,overlay=FILE][,id=NAME]';

/**
 * A drive from `file=PATH,key=value,...`, or from a path alone. As in QEMU, two commas are one that is part of a value.
 * @throws UsageError naming the option.
 */
export function parseDrive(text: string): DriveConfig {
  const drive: { -readonly [K in keyof DriveConfig]?: DriveConfig[K] } = {};
  const seen = new Set<string>();
  split(text).forEach((part, index) => {
    const equals = part.indexOf('=');
    const bare = equals < 0;
    const isPath = bare && index === 0 && part !== 'readonly';
    const key = isPath ? 'file' : bare ? part : part.slice(0, equals);
    const value = isPath ? part : bare ? undefined : part.slice(equals + 1);
    if (seen.has(key)) throw problem(text, `${key} is given twice`);
    seen.add(key);
    if (value === '' || (bare && !isPath && key !== 'readonly')) throw problem(text, `'${part}' lacks a value`);
    set(drive, text, key, value ?? 'on');
  });
  const { file } = drive;
  if (file === undefined) throw problem(text, 'no file');
  return { ...drive, file };
}

function set(drive: { -readonly [K in keyof DriveConfig]?: DriveConfig[K] }, text: string, key: string, value: string) {
  switch (key) {
    case 'file':
    case 'overlay':
    case 'id':
      drive[key] = value;
      break;
    case 'readonly':
      drive.readOnly = oneOf(text, key, value, ['on', 'off'] as const) === 'on';
      break;
    case 'cache':
      drive.cache = oneOf(text, key, value, CACHES);
      break;
    case 'format':
      oneOf(text, key, value, ['raw'] as const);
      break;
    default:
      throw problem(text, `unknown key '${key}'`);
  }
}

function oneOf<T extends string>(text: string, key: string, value: string, choices: readonly T[]): T {
  const choice = choices.find((candidate) => candidate === value);
  if (choice === undefined) throw problem(text, `${key} '${value}' is not ${choices.join(' or ')}`);
  return choice;
}

function problem(text: string, what: string): UsageError {
  return new UsageError(`--drive ${text}: ${what}; write ${SYNTAX} (a comma in a path is two)`);
}

/** At single commas. No argument of a program has a NUL. */
function split(text: string): string[] {
  const parts = text.replaceAll(',,', '\0').split(',');
  return parts.map((part) => part.replaceAll('\0', ','));
}
