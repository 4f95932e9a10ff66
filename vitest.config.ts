import { defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/** Those that boot guest after guest begin first: at the end, with nothing beside them, they would have the host to themselves. */
const LONG = ['guest/readme', 'guest/snapshot', 'guest/', 'kvm/', ''];
const rank = ({ moduleId }: TestSpecification) => LONG.findIndex((part) => moduleId.includes(`/test/${part}`));

class LongFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

// Tests import the compiled program (#dist/…): what is tested is what runs. `npm run build` first, as scripts/test does.
export default defineConfig({
  test: {
    include: ['test/{unit,kvm,guest,fuzz}/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 2,
    // For what hangs: nothing is measured by them, and a busy host that interprets guests takes minutes for a boot.
    testTimeout: 300_000,
    hookTimeout: 600_000,
    server: { deps: { external: [/\/dist\//] } },
    sequence: { sequencer: LongFirst },
  },
});
