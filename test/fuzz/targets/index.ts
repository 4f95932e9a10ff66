import type { Target } from '../target.js';
import { blkOverlay, blkRaw } from './blk.js';
import { consoleControl, consolePort } from './console.js';
import { netReceive, netTransmit } from './net.js';
import { queue } from './queue.js';
import { rng } from './rng.js';
import { userDevice } from './user-device.js';
import { vsock } from './vsock.js';

/** Adding a target is a line here. */
export const targets: readonly Target[] = [
  queue,
  rng,
  blkRaw,
  blkOverlay,
  netReceive,
  netTransmit,
  consolePort,
  consoleControl,
  userDevice,
  vsock,
];
