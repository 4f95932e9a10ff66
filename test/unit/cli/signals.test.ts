import { spawnSync } from 'node:child_process';
import { expect, test } from 'vitest';

const module = new URL('../../../dist/cli/signals.js', import.meta.url).href;

/** Runs code with what signals.ts exports. */
function run(code: string) {
  const script = `import { abortOnSignals, onSignals } from ${JSON.stringify(module)}; ${code}; setTimeout(() => {}, 5000);`;
  const { status, signal, stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    encoding: 'utf8',
  });
  return { status, signal, stdout };
}

/** It has come when this returns, and Node has not told it yet. */
const raise = (signal: string) => `process.kill(process.pid, '${signal}')`;

test.each([
  ['SIGHUP', 129],
  ['SIGINT', 130],
  ['SIGTERM', 143],
])('a %s is for who listens when it is told, not when it came', (signal, code) => {
  const before = `const interrupt = abortOnSignals(); ${raise(signal)}; interrupt[Symbol.dispose]()`;
  expect(run(`${before}; onSignals((code) => process.exit(code))`)).toMatchObject({ status: code });
});

test('one that nobody listens to any more does what it always does', () => {
  const result = run(`const remove = onSignals(() => process.exit(1)); ${raise('SIGTERM')}; remove()`);
  expect(result).toMatchObject({ signal: 'SIGTERM' });
});

test('who only wants to know does not keep it from that', () => {
  const result = run(`onSignals(() => { console.log('told'); return false; }); ${raise('SIGINT')}`);
  expect(result).toMatchObject({ signal: 'SIGINT', stdout: 'told\n' });
});

test('nor from others', () => {
  const others = `onSignals((code, signal) => { console.log(code, signal); process.exit(0); })`;
  expect(run(`onSignals(() => false); ${others}; ${raise('SIGHUP')}`)).toMatchObject({ stdout: '129 SIGHUP\n' });
});
