import type { ArgumentsCamelCase, Argv } from 'yargs';
import { hostOptions } from './host-options.js';
import { repeatable } from './repeatable.js';

export function builder(yargs: Argv) {
  const own = yargs
    .usage(
      '$0 run [options] [-- command..]\n\nBoot a Linux guest: with this terminal as its console, in the background (--detach), ' +
        'or for one command, whose exit code is this one’s',
    )
    .option('kernel', {
      type: 'string',
      requiresArg: true,
      describe: 'vmlinux, bzImage or PVH ELF [default: built-in]',
    })
    .option('initrd', { type: 'string', requiresArg: true, describe: 'initial RAM disk [default: built-in]' })
    .option('append', { type: 'string', requiresArg: true, describe: 'more kernel command line' })
    .option('memory', { alias: 'm', type: 'string', default: '64M', describe: 'guest RAM; a bare number is MiB' })
    .option('cpus', { type: 'string', default: '1', requiresArg: true, describe: 'number of vCPUs' })
    .option('vcpu-threads', {
      type: 'boolean',
      default: false,
      describe: 'a thread for the vCPU, as several always have: quicker devices, for a second core',
    })
    .option('drive', {
      type: 'string',
      array: true,
      requiresArg: true,
      describe:
        'a disk: FILE or file=FILE[,readonly][,cache=writeback|none|unsafe][,overlay=FILE][,id=NAME]; repeatable',
    })
    .option('serial', {
      type: 'string',
      describe: 'ttyS0: stdio, none or file:PATH [default: stdio; none with --console stdio]',
    })
    .option('console', {
      type: 'string',
      default: 'none',
      describe: 'hvc0: stdio, none, file:PATH or socket:PATH; /dev/console if stdio, or if ttyS0 is none',
    })
    .option('port', repeatable('a byte stream of the guest: name=NAME,socket=PATH or name=NAME,file=PATH; repeatable'))
    .option(
      'net',
      repeatable('tap=NAME, user[,hostfwd=tcp:127.0.0.1:8080-:80] or none, each with [,mac=..]; repeatable'),
    )
    .option('rng', { type: 'boolean', default: false, describe: 'an entropy device, /dev/hwrng in the guest' })
    .option('vsock', {
      type: 'string',
      describe:
        'sockets between host and guest: nothing, or cid=N and socket=PATH, by which to connect [default: none]',
    })
    .option('agent', {
      type: 'boolean',
      describe:
        'tsvisor’s agent in the guest, for exec and its like [default: with -- COMMAND, or a name and the built-in kernel]',
    })
    .option('acpi', {
      choices: ['auto', 'on', 'off'] as const,
      default: 'auto' as const,
      describe: 'how the guest finds its devices: ACPI alone, without, or both',
    })
    .option('no-reboot', {
      type: 'boolean',
      default: false,
      describe: 'a guest reset ends the machine, not restarts it',
    });
  return hostOptions(own)
    .example('$0 run', 'boot the default guest to a shell; poweroff ends it')
    .example('$0 run --kernel vmlinux --initrd rootfs.cpio', 'boot your own; the console stays ttyS0')
    .example('$0 run --drive disk.img --drive file=data.img,readonly', 'with disks: /dev/vda, /dev/vdb')
    .example('$0 run --net user,hostfwd=tcp:127.0.0.1:8080-:80', 'a network without privilege; 8080 here is 80 there')
    .example('$0 run --net tap=tap0', 'a tap of the host')
    .example('$0 run -m 256M --append "debug loglevel=7"', 'more memory, a chattier kernel')
    .example('$0 run --console stdio', 'the terminal as hvc0: the guest knows its size')
    .example('$0 run --port name=agent,socket=agent.sock', 'one client at a time talks to a program in the guest')
    .example('$0 run -- uname -a', 'boot, run one command with its exit code, power off')
    .example('$0 run --name web -d', 'in the background; then: exec, shell, cp, console, logs, stop web')
    .example("printf 'uname -a\\npoweroff\\n' | $0 run", 'a script on the guest’s shell')
    .epilogue(
      'Keys: Ctrl-A x ends the machine, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h helps.\n' +
        'With a command: its streams, terminal and exit code; what the console said is shown only on failure.\n' +
        'Exit codes: 0 powered off, 1-255 the guest’s own (debug-exit port) or the command’s, 64 usage, 66 bad image, ' +
        '69 no KVM, 71 memory, 72 bad drive, 73 output file, 74 network, 76 no agent, 77 no permission, 80 guest reset, ' +
        '81 triple fault, 82 KVM failure, 83 unknown instruction, 84 kernel panic, 124 timeout, 126 and 127 the command ' +
        'cannot be run, 130 SIGINT, 141 stdout closed, 143 SIGTERM.',
    );
}

export type RunArguments = ArgumentsCamelCase<Awaited<ReturnType<typeof builder>['argv']>>;

export async function handler(args: RunArguments): Promise<void> {
  const { runMachine } = await import('./run-machine.js');
  await runMachine(args);
}
