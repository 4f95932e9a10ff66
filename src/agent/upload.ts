import type { Connection } from './connection.js';
import { frameError } from './guest-error.js';
import { FrameType } from './protocol.js';

export async function expectOk(connection: Connection): Promise<void> {
  const frame = await connection.expect();
  if (frame.type !== FrameType.ok) throw frameError('ERR_GUEST_FILE', frame);
}

/** Sends frames and waits for the agent's OK. An answer before the last of them is an error, and stops it. */
export async function upload(connection: Connection, frames: AsyncIterable<Uint8Array>): Promise<void> {
  let answered = false;
  let goOn = () => {};
  const answer = expectOk(connection).finally(() => {
    answered = true;
    goOn();
  });
  answer.catch(() => {});
  for await (const frame of frames) {
    if (answered) break;
    // Not Promise.race(), which would hang something on the answer for every frame. When both fail, the answer tells why.
    await new Promise<void>((resolve) => {
      goOn = resolve;
      connection.send(frame).then(resolve, () => answered && resolve());
    });
  }
  await answer;
}
