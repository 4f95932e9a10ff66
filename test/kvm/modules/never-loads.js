// A device whose module waits for something that does not come.
setInterval(() => {}, 1000);
await new Promise(() => {});
