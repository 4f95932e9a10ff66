// Keeps the code that V8 has compiled for the command line and its machine thread beside their bundles, so that the next
// run need not compile it again. npm runs this when the package is installed, and `npm run build` in a clone. It runs a
// machine whose guest ends at once; where there is no KVM, it keeps what was compiled until that was found.
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';

const program = join(import.meta.dirname, '../dist/cli/start.cjs');
if (!existsSync(program)) process.exit(0); // a clone that is not built yet

/** An ELF whose code says a line on the serial port and ends its machine by port 0xf4. */
function guest() {
  const address = 0x100000;
  const code = Buffer.from('66baf803b00aeeb000e6f4f4', 'hex'); // mov dx, 0x3f8; mov al, '\n'; out dx, al; mov al, 0; out 0xf4, al; hlt
  const headers = Buffer.alloc(64 + 56);
  headers.set([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]); // 64 bits, little-endian
  headers.writeUInt16LE(2, 16); // ET_EXEC
  headers.writeUInt16LE(62, 18); // EM_X86_64
  headers.writeUInt32LE(1, 20);
  headers.writeBigUInt64LE(BigInt(address), 24); // e_entry
  headers.writeBigUInt64LE(64n, 32); // e_phoff
  [64, 56, 1, 64].forEach((size, index) => headers.writeUInt16LE(size, 52 + 2 * index));
  headers.writeUInt32LE(1, 64); // PT_LOAD
  headers.writeUInt32LE(5, 68); // read, execute
  [headers.length, address, address, code.length, code.length, 0x1000].forEach((value, index) =>
    headers.writeBigUInt64LE(BigInt(value), 72 + 8 * index),
  );
  return Buffer.concat([headers, code]);
}

const folder = mkdtempSync(join(tmpdir(), 'tsvisor-code-cache-'));
process.once('exit', () => rmSync(folder, { recursive: true }));
const kernel = join(folder, 'guest');
writeFileSync(kernel, guest());

process.env.TSVISOR_WRITE_CODE_CACHE = '1';
// A thread writes its cache when it ends by itself, which is when its machine has ended.
const { postMessage } = Worker.prototype;
const threads = new Set();
Worker.prototype.postMessage = function (...message) {
  threads.add(this);
  postMessage.apply(this, message);
};
const { exit } = process;
process.exit = async () => {
  while ([...threads].some(({ threadId }) => threadId !== -1)) await delay(10);
  exit();
};
process.argv = [process.execPath, program, 'run', '--timeout', '20', '--kernel', kernel];
createRequire(import.meta.url)(program);
