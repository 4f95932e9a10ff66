import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { parseDrive } from '#dist/cli/drive-option.js';
import { cli } from '../../support/cli.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

describe('--drive', () => {
  test.each([
    ['disk.img', { file: 'disk.img' }],
    ['file=disk.img', { file: 'disk.img' }],
    ['readonly,file=x', { file: 'x', readOnly: true }],
    ['disk.img,readonly', { file: 'disk.img', readOnly: true }],
    ['file=x,readonly=on', { file: 'x', readOnly: true }],
    ['file=x,readonly=off', { file: 'x', readOnly: false }],
    ['file=x,cache=none,id=root', { file: 'x', cache: 'none', id: 'root' }],
    ['file=x,cache=unsafe', { file: 'x', cache: 'unsafe' }],
    ['file=x,overlay=y.ovl', { file: 'x', overlay: 'y.ovl' }],
    ['overlay=y,file=x', { file: 'x', overlay: 'y' }],
    ['file=x,format=raw', { file: 'x' }],
    ['file=a,,b,readonly', { file: 'a,b', readOnly: true }],
    ['a,,b', { file: 'a,b' }],
    ['file=a,,,readonly', { file: 'a,', readOnly: true }],
    ['file=a,,,,b', { file: 'a,,b' }],
    ['file=a=b', { file: 'a=b' }],
    ['file=/dev/loop0', { file: '/dev/loop0' }],
    ['file=spaced name.img', { file: 'spaced name.img' }],
  ])('%s', (text, drive) => {
    expect(parseDrive(text)).toEqual(drive);
  });

  test.each([
    ['', /lacks a value/],
    ['file=', /'file=' lacks a value/],
    ['readonly', /no file/],
    ['cache=none', /no file/],
    ['file=x,overlay', /'overlay' lacks a value/],
    ['file=x,overlay=', /'overlay=' lacks a value/],
    ['file=x,', /'' lacks a value/],
    ['file=x,file=y', /file is given twice/],
    ['x,file=y', /file is given twice/],
    ['file=x,if=virtio', /unknown key 'if'/],
    ['fil=x', /unknown key 'fil'/],
    ['file=x,cache=writethrough', /cache 'writethrough' is not writeback or none or unsafe/],
    ['file=x,readonly=yes', /readonly 'yes' is not on or off/],
    ['file=x,format=qcow2', /format 'qcow2' is not raw/],
    ['file=x,__proto__=y', /unknown key '__proto__'/],
  ])('%s is refused, with what may be written', (text, why) => {
    const parse = () => parseDrive(text);
    expect(parse).toThrow(expect.objectContaining({ code: 'ERR_USAGE' }));
    expect(parse).toThrow(why);
    expect(parse).toThrow(/write file=FILE\[,readonly\]\[,cache=writeback\|none\|unsafe\]\[,overlay=FILE\]/);
  });
});

describe('the command line', () => {
  const folder = temporaryFolder();

  test('takes --drive as often as it is given, and of other options the last', async () => {
    const first = join(folder, 'first.img');
    writeFileSync(first, new Uint8Array(512));
    const args = [
      '--kernel',
      '/nonexistent/vmlinux',
      '-m',
      '1M',
      '--drive',
      first,
      '--drive=/nonexistent/2.img,readonly',
      '-m',
      '64M',
    ];
    const { code, stderr } = await cli(['run', ...args]);
    expect(stderr).toMatch(/^tsvisor: \/nonexistent\/2\.img: no such image; make one with: truncate[^\n]*\n$/);
    expect(code).toBe(72);
    expect(await cli(['run', '--drive', first, 'stray'])).toMatchObject({ code: 64, stdout: '' });
  });
});
