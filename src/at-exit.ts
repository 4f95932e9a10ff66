const callbacks = new Set<() => void>();

function onExit(): void {
  for (const callback of callbacks) callback();
}

/** Calls back when the process exits. One listener serves all: Node warns of more than ten. @returns what undoes it. */
export function atExit(callback: () => void): () => void {
  if (callbacks.size === 0) process.on('exit', onExit);
  callbacks.add(callback);
  return () => {
    if (callbacks.delete(callback) && callbacks.size === 0) process.removeListener('exit', onExit);
  };
}
