// One side of a migration, in a process of its own; see peer.ts.
import { Machine } from '#dist/index.js';
import { stages } from '#dist/migration/stages.js';

const { role, snapshot, overlay, key, at, act, address, options = {} } = JSON.parse(process.argv[2]);
/** Milliseconds for the other side, which the host may have little time for; connections that are cut are lost at once. */
const timeout = 60_000;
const say = (message) => process.connected && process.send(message);
const failed = (error) => say({ failed: { code: error.code, message: error.message, cause: error.cause?.message } });

let machine;
let goOn;

stages.reached = async (stage) => {
  if (stage === at && act === 'kill') process.kill(process.pid, 'SIGKILL');
  say({ stage });
  if (stage === at && !goOn) await new Promise((resolve) => (goOn = resolve));
};

function watch() {
  let line = '';
  machine.serial.setEncoding('latin1').on('data', (text) => {
    const lines = (line + text).split('\n');
    line = lines.pop();
    for (const one of lines) {
      const [, pass] = /^pass (\d+)/.exec(one) ?? [];
      if (pass) say({ pass: Number(pass) });
      else if (one.startsWith('wrong')) say({ wrong: one });
    }
  });
  machine.on('state', (state) => say({ state }));
  machine.wait().then(({ reason }) => say({ ended: reason }), failed);
}

const commands = {
  goOn: () => goOn(),
  async migrate({ to, ...more }) {
    const progress = [];
    const onProgress = (one) => progress.push(one);
    say({ migrated: await machine.migrate(to, { key, timeout, onProgress, ...options, ...more }), progress });
  },
  async exec({ command }) {
    say({ executed: await machine.exec(command, { timeout: 120_000 }) });
  },
  async spawn({ command }) {
    const child = await machine.spawn(command);
    child.stdout.on('data', (data) => say({ output: String(data) }));
    child.exited.then(
      (exit) => say({ exit }),
      ({ code, message }) => say({ lost: { code, message } }),
    );
  },
  async resume() {
    await machine.resume();
  },
  async pause() {
    await machine.pause();
  },
};

process.on('message', ({ what, ...more }) => {
  Promise.resolve()
    .then(() => commands[what](more))
    .catch(failed);
});

try {
  if (role === 'source') {
    machine = await Machine.restore(snapshot, { drives: [overlay === undefined ? undefined : { overlay }] });
    watch();
    await machine.resume();
    say({ ready: true });
  } else {
    machine = await Machine.receive(address, { key, timeout, onListening: (where) => say({ listening: where }), ...options });
    watch();
    say({ received: machine.state });
  }
} catch (error) {
  failed(error);
}
