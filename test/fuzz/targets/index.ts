import type { Target } from '../target.js';
import { queue } from './queue.js';
import { rng } from './rng.js';

/** Adding a target is a line here. */
export const targets: readonly Target[] = [queue, rng];
