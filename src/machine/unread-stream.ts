import type { Duplex } from 'node:stream';

/**
 * Keeps a console from stopping its guest while nobody reads it: what does not fit the stream's buffer is discarded, the
 * oldest first. @returns a function that ends this, for when somebody wants to read.
 */
export function discardWhileUnread(stream: Duplex): () => void {
  const onReadable = () => {
    // read(0) asks for more, and for a further event when it is there.
    stream.read(stream.readableLength >= stream.readableHighWaterMark ? undefined : 0);
  };
  stream.on('readable', onReadable);
  return () => stream.removeListener('readable', onReadable);
}
