import { defineConfig } from 'vitest/config';

// Tests import the compiled program (#dist/…): what is tested is what runs. `npm run build` first, as scripts/test does.
export default defineConfig({
  test: {
    include: ['test/{unit,kvm,guest,fuzz}/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: 60_000,
    hookTimeout: 120_000,
    server: { deps: { external: [/\/dist\//] } },
  },
});
