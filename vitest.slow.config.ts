import { defineConfig } from 'vitest/config';
import base from './vitest.config.js';

// Tests that take many minutes, outside the default run: npx vitest run --config vitest.slow.config.ts
export default defineConfig({ test: { ...base.test, include: ['test/slow/**/*.test.ts'], maxWorkers: 1 } });
