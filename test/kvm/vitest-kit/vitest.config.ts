import { defineConfig } from 'vitest/config';

// As in a project that uses the kit: nothing but which files hold tests.
export default defineConfig({ test: { include: ['passing.ts', 'failing.ts', 'linux.ts'] } });
