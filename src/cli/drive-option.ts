import { UsageError } from '../errors.js';
import type { DriveConfig } from '../machine/device-config.js';
import type { DriveOverride } from '../snapshot/disks.js';

const CACHES = ['writeback', 'none', 'unsafe'] as const;
const SYNTAX = 'file=FILE[,readonly][,cache=writeback|none|unsafe][,overlay=FILE][,id=NAME]';
const OVERRIDE_SYNTAX = 'file=FILE, overlay=FILE or both, and index=N for another than the next drive';

/**
 * A drive from `file=PATH,key=value,...`, or from a path alone. As in QEMU, two commas are one that is part of a value.
 * @throws UsageError naming the option.
 */
export function parseDrive(text: string): DriveConfig {
  const drive: { -readonly [K in keyof DriveConfig]?: DriveConfig[K] } = {};
  for (const [key, value] of settings(text)) set(drive, text, key, value);
  const { file } = drive;
  if (file === undefined) throw problem(text, 'no file');
  return { ...drive, file };
}

/**
 * What `--drive` options give to a machine that goes on: the first to its first drive and so on, or each to `index=N`.
 * @throws UsageError naming the option.
 */
export function parseDriveOverrides(options: readonly string[]): (DriveOverride | undefined)[] {
  const overrides: (DriveOverride | undefined)[] = [];
  for (const [position, text] of options.entries()) {
    const wrong = (what: string) => new UsageError(`--drive ${text}: ${what}; write ${OVERRIDE_SYNTAX}`);
    const override: { file?: string; overlay?: string } = {};
    let index = position;
    for (const [key, value] of settings(text, wrong)) {
      if (key === 'file' || key === 'overlay') override[key] = value;
      else if (key !== 'index') throw wrong(`a drive that goes on has no '${key}'`);
      else if (/^\d{1,3}$/.test(value)) index = Number(value);
      else throw wrong(`'${value}' is no index`);
    }
    if (overrides[index]) throw wrong(`drive ${index} is given twice`);
    overrides[index] = override;
  }
  return Array.from(overrides); // one that was left out is there, as undefined
}

/** The settings of an option; a path alone is `file`, and `readonly` alone is on. @throws UsageError */
function settings(text: string, wrong = (what: string) => problem(text, what)): [key: string, value: string][] {
  const seen = new Set<string>();
  return split(text).map((part, index) => {
    const equals = part.indexOf('=');
    const bare = equals < 0;
    const isPath = bare && index === 0 && part !== 'readonly';
    const key = isPath ? 'file' : bare ? part : part.slice(0, equals);
    const value = isPath ? part : bare ? undefined : part.slice(equals + 1);
    if (seen.has(key)) throw wrong(`${key} is given twice`);
    seen.add(key);
    if (value === '' || (bare && !isPath && key !== 'readonly')) throw wrong(`'${part}' lacks a value`);
    return [key, value ?? 'on'];
  });
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
