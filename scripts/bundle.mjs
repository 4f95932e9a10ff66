// Makes one file of all that a thread loads, in the place of its entry, so that it starts quickly: `npm run build` does so
// after tsc. Where only tsc has run, every module is a file of its own, and everything works all the same.
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { build } from 'esbuild';

const root = join(import.meta.dirname, '..');
/** Folders of packages that are in a bundle. */
const packages = new Set();

/** Bundles entries of src to files of the same name in dist. */
async function bundle(entries, options) {
  for (const entry of entries) {
    const outfile = `dist/${entry.replace(/\.c?ts$/, '.cjs')}`;
    rmSync(join(root, `${outfile}.cache`), { force: true }); // V8 knows the source by nothing but its length
    const { metafile } = await build({
      absWorkingDir: root,
      entryPoints: [`src/${entry}`],
      outfile,
      bundle: true,
      platform: 'node',
      target: 'node20',
      format: 'cjs',
      logLevel: 'warning',
      metafile: true,
      ...options,
    });
    for (const input of Object.keys(metafile.inputs)) {
      const [folder] = /^.*node_modules\/(@[^/]+\/)?[^/]+/.exec(input) ?? [];
      if (folder) packages.add(folder);
    }
  }
}

await bundle(['cli/main.ts', 'machine/machine-thread.ts'], {
  external: ['iced-x86', 'koffi', 'pino', '../../device/index.js'], // rarely needed
  supported: { 'dynamic-import': false }, // it becomes require(), which code from V8's cache can do
  define: { 'import.meta.url': 'moduleUrl' },
  banner: { js: "const moduleUrl = require('node:url').pathToFileURL(__filename).href;" },
});
// These load the bundles, with V8's code cache.
await bundle(['cli/start.cts', 'machine/thread.cts'], {
  external: ['./main.js', './machine-thread.js'],
  define: { BUNDLED: 'true' },
});

const licenses = [...packages].sort().map((folder) => {
  const [file] = readdirSync(join(root, folder)).filter((name) => /^licen[cs]e/i.test(name));
  const { name, version, license } = JSON.parse(readFileSync(join(root, folder, 'package.json'), 'utf8'));
  return `${name} ${version} (${license})\n\n${file ? readFileSync(join(root, folder, file), 'utf8') : ''}`;
});
writeFileSync(join(root, 'dist/third-party-licenses.txt'), licenses.join('\n\n'));
