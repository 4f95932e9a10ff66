// Compiles the addon into build/Release, unless it is there already. npm runs this when the package is installed, and
// scripts/build in a clone. What was compiled is kept under the user's cache by content, so that the next install of the
// same sources need not compile. Says nothing when all is well.
// Usage: compile.mjs [SANITIZERS], e.g. address,undefined
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join, resolve } from 'node:path';

const here = import.meta.dirname;
const built = join(here, 'build', 'Release', 'tsvisor.node');
const stamp = join(here, 'build', '.tsvisor-stamp');
const [sanitizers = ''] = process.argv.slice(2);

function fail(message) {
  process.stderr.write(`tsvisor: ${message}\n`);
  process.exit(1);
}

/** What is printed by COMMAND --version; undefined when there is no such command. */
function version(command) {
  const { error, stdout } = spawnSync(command, ['--version'], { encoding: 'utf8' });
  return error ? undefined : stdout;
}

const compiler = process.env.CXX || 'g++';
const compilerVersion = version(compiler);
const missing = [compiler, process.env.MAKE || 'make', process.env.PYTHON || 'python3'].filter((tool) => !version(tool));
if (missing.length > 0) {
  const remedy = 'install g++, make and python3 (Debian: apt-get install g++ make python3), then: npm rebuild tsvisor';
  fail(`its native part is compiled on this host, which lacks ${missing.join(', ')}; ${remedy}`);
}

const hash = createHash('sha256').update([process.arch, compilerVersion, sanitizers].join('\0'));
for (const name of readdirSync(here).sort()) {
  if (/\.(cc|h|gyp)$/.test(name)) hash.update(readFileSync(join(here, name)));
}
const key = hash.digest('hex').slice(0, 24);
if (existsSync(built) && existsSync(stamp) && readFileSync(stamp, 'utf8') === key) process.exit(0);

const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tsvisor', 'addon');
const kept = join(cache, `${key}.node`);

/** Copies as one step: another process may be reading the destination. */
function copy(from, to) {
  mkdirSync(dirname(to), { recursive: true });
  copyFileSync(from, `${to}.${process.pid}`);
  renameSync(`${to}.${process.pid}`, to);
}

function compile() {
  const args = ['rebuild', '--loglevel=error', '-C', here];
  // The headers of the node that runs, where its installation has them: they need no download then.
  const prefix = resolve(process.execPath, '../..');
  if (!process.env.npm_config_nodedir && existsSync(join(prefix, 'include/node/node.h'))) {
    args.push(`--nodedir=${prefix}`);
  }
  if (sanitizers) args.push('--', `-Dsanitize=${sanitizers}`);
  // Every package manager has node-gyp on the PATH of the scripts it runs.
  const { error, status, stdout, stderr } = spawnSync('node-gyp', args, { encoding: 'utf8', maxBuffer: 2 ** 26 });
  if (error) fail(`node-gyp cannot be run (${error.code}); run this by npm: npm rebuild tsvisor`);
  if (status !== 0) {
    process.stderr.write(`${`${stdout}${stderr}`.trim().split('\n').slice(-40).join('\n')}\n`);
    fail('compiling the native part failed; its last lines are above');
  }
}

if (!existsSync(kept)) {
  compile();
  try {
    copy(built, kept);
  } catch {
    process.exit(0); // no cache that can be written: what was built is in its place
  }
  rmSync(join(here, 'build'), { recursive: true }); // object files
}
copy(kept, built);
writeFileSync(stamp, key);
