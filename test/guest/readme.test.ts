import { afterAll, beforeAll, test } from 'vitest';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { SnippetProject } from '../support/snippet-project.js';
import { documents, snippets } from '../support/snippets.js';
import { temporaryFolder } from '../support/temporary-folder.js';

// Every snippet of the documents that does not say why it cannot be run (test/unit/snippets.test.ts sees to that).
for (const document of documents()) {
  const found = snippets(document).filter(({ notRun }) => notRun === undefined);
  if (found.length === 0) continue;
  describeKvm(document, () => {
    const project = new SnippetProject(temporaryFolder());
    beforeAll(() => {
      project.addGuest(defaultGuest());
      for (const snippet of found) if (snippet.file) project.write(snippet);
    });
    afterAll(() => project.close());

    for (const snippet of found.filter(({ file }) => file === undefined)) {
      const commands = snippet.code.split('\n').length;
      test(`line ${snippet.line}: ${snippet.code.split('\n')[0]}`, { timeout: 320_000 * commands }, async () => {
        await project.run(snippet);
      });
    }
  });
}
