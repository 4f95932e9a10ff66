import { existsSync } from 'node:fs';
import { describe } from 'vitest';

/** Like describe, for tests that run a guest: skipped only where there is no /dev/kvm; scripts/test says so loudly. */
export const describeKvm = describe.runIf(existsSync('/dev/kvm'));
