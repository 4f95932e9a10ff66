import { once } from 'node:events';
import { connect as connectSocket, createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import { Agent } from '#dist/agent/agent.js';
import { encodeFrame, FrameType, FrameWriter } from '#dist/agent/protocol.js';

export const hello = (version = 1) => new FrameWriter(FrameType.hello).u32(version).string('0', 'version').frame();
export const frame = (type: number, ...numbers: number[]) => {
  const writer = new FrameWriter(type);
  for (const number of numbers) writer.u32(number);
  return writer.frame();
};
export const data = (type: number, bytes: Uint8Array | string = '') =>
  encodeFrame(type, Buffer.from(bytes as Uint8Array));

/** An agent that says what it is told to: once the client has said something, these bytes. */
export class FakeAgent implements AsyncDisposable {
  readonly agent: Agent;
  /** Connections that the client has not closed. */
  readonly open = new Set<Socket>();
  answer: (socket: Socket) => void = () => {};
  readonly #server: Server;

  private constructor(path: string, server: Server) {
    this.#server = server;
    this.agent = new Agent(
      async () => {
        const socket = connectSocket(path);
        await once(socket, 'connect');
        return socket;
      },
      { answerTimeout: 300 },
    );
  }

  static async start(folder: string): Promise<FakeAgent> {
    const path = join(folder, 'fake.sock');
    const server = createServer({ allowHalfOpen: true });
    const fake = new FakeAgent(path, server);
    server.on('connection', (socket) => {
      fake.open.add(socket);
      socket.on('error', () => {});
      socket.on('close', () => fake.open.delete(socket));
      socket.on('end', () => socket.destroy());
      socket.once('data', () => fake.answer(socket));
      socket.resume();
    });
    server.listen(path);
    await once(server, 'listening');
    return fake;
  }

  /** What it sends from now on; it then ends the connection only when told to. */
  says(bytes: readonly Uint8Array[], end = false): void {
    this.answer = (socket) => {
      socket.write(Buffer.concat(bytes));
      if (end) socket.end();
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.open) socket.destroy();
    this.#server.close();
  }
}
