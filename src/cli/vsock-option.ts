import { UsageError } from '../errors.js';
import type { VsockConfig } from '../machine/device-config.js';

/** The vsock that `--vsock` asks for; undefined without it. @throws UsageError */
export function parseVsock(option: string | undefined): VsockConfig | undefined {
  if (option === undefined) return undefined;
  const wrong = (what: string) =>
    new UsageError(`--vsock ${option}: ${what}; write --vsock, or --vsock cid=42,socket=PATH`);
  const config: { cid?: number; socket?: string } = {};
  for (const setting of option === '' ? [] : option.split(',')) {
    const [key = '', ...rest] = setting.split('=');
    const value = rest.join('=');
    if (key !== 'cid' && key !== 'socket') throw wrong(`'${key}' is no setting`);
    if (value === '') throw wrong(`'${key}' needs a value`);
    if (config[key] !== undefined) throw wrong(`'${key}' is given twice`);
    if (key === 'socket') config.socket = value;
    else if (/^\d+$/.test(value)) config.cid = Number(value);
    else throw wrong(`'${value}' is not a number`);
  }
  return config;
}
