import fs = require('node:fs');
import path = require('node:path');
import vm = require('node:vm');

/** Set by scripts/bundle.mjs in the files that it makes. */
declare const BUNDLED: boolean | undefined;

/** Environment variable that asks for the code caches to be written. */
const WRITE_CACHE = 'TSVISOR_WRITE_CODE_CACHE';

/** Those of a CommonJS module, and what stands for import(), which code from a cache cannot do. */
const PARAMETERS = 'exports, require, module, __filename, __dirname, importModule';

/** Whether this is part of a bundle; otherwise every module is a file, as tsc leaves them. */
const bundled = typeof BUNDLED !== 'undefined';

/**
 * Runs a bundle as a CommonJS module, with the code that V8 kept of an earlier run beside it, in FILE.cache. V8 refuses a
 * cache that another version or other flags of it made, or of a source of another length; then the code is compiled as ever.
 */
function run(file: string, require: NodeJS.Require): unknown {
  const source = fs.readFileSync(file, 'latin1'); // it is ASCII
  const cachedData = readCache(`${file}.cache`);
  const script = new vm.Script(`(function (${PARAMETERS}) {${source}\n})`, { filename: file, cachedData });
  const module = { exports: {} };
  script.runInThisContext()(module.exports, require, module, file, path.dirname(file), importModule);
  if (process.env[WRITE_CACHE]) process.once('exit', () => write(`${file}.cache`, script.createCachedData()));
  return module.exports;
}

/** @param url of a module outside the bundles */
function importModule(url: string): Promise<unknown> {
  return import(url);
}

function readCache(file: string): Buffer | undefined {
  if (process.env[WRITE_CACHE]) return undefined;
  try {
    return fs.readFileSync(file);
  } catch {
    return undefined;
  }
}

/** In one step: another process may be reading it. */
function write(file: string, contents: Buffer): void {
  const unfinished = `${file}.${process.pid}`;
  fs.writeFileSync(unfinished, contents);
  fs.renameSync(unfinished, file);
}

export = { bundled, run, WRITE_CACHE };
