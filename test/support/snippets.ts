import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

export const SNIPPET_LANGUAGES = ['js', 'ts', 'sh', 'console'] as const;

/** A fenced block of a document that can be run. */
export interface Snippet {
  readonly document: string;
  /** Of its first line of code. */
  readonly line: number;
  readonly language: (typeof SNIPPET_LANGUAGES)[number];
  readonly code: string;
  /** Why it is not run: `<!-- not run: REASON -->` on the line before the block. */
  readonly notRun: string | undefined;
  /** Where it is kept for the other blocks of its document, instead of being run: `<!-- file: NAME -->` before it. */
  readonly file: string | undefined;
}

/** README.md and docs/*.md. */
export function documents(): string[] {
  const docs = readdirSync('docs').filter((name) => name.endsWith('.md'));
  return ['README.md', ...docs.sort().map((name) => join('docs', name))];
}

/** The blocks of a document that can be run, in order. @throws Error for a comment before a block that says nothing. */
export function snippets(document: string, text = readFileSync(document, 'utf8')): Snippet[] {
  const found: Snippet[] = [];
  let open: { fence: string; language: string; line: number; comment: string } | undefined;
  let code: string[] = [];
  let comment = '';
  for (const [index, line] of text.split('\n').entries()) {
    const [, fence = '', language = ''] = /^ *(`{3,}|~{3,})(\S*)/.exec(line) ?? [];
    if (open) {
      if (fence.startsWith(open.fence) && language === '') {
        found.push(...snippet(document, open, code.join('\n')));
        open = undefined;
      } else code.push(line);
    } else if (fence) {
      open = { fence, language, line: index + 2, comment };
      code = [];
    }
    if (line.trim() !== '') comment = line;
  }
  return found;
}

function snippet(
  document: string,
  { language, line, comment }: { language: string; line: number; comment: string },
  code: string,
): Snippet[] {
  const known = SNIPPET_LANGUAGES.find((name) => name === language);
  if (!known) return [];
  const [, key, value = ''] = /^ *<!-- (not run|file):(.*)-->$/.exec(comment) ?? [];
  const text = value.trim();
  if (key && !text) throw new Error(`${document}:${line - 2}: '${comment}' gives no reason or name`);
  const [notRun, file] = [key === 'not run' ? text : undefined, key === 'file' ? text : undefined];
  return [{ document, line, language: known, code, notRun, file }];
}

/** A command of a console block and what it should print. */
export interface ConsoleStep {
  readonly prompt: string;
  readonly command: string;
  readonly output: string;
}

/** Reads `$ `, `/ # ` or the like before each command; a prompt alone at the end is where the last command leads to. */
export function consoleSteps(code: string): { steps: ConsoleStep[]; last: string | undefined } {
  const steps: { prompt: string; command: string; output: string }[] = [];
  let last: string | undefined;
  for (const line of code.split('\n')) {
    const [, prompt, command = ''] = /^(\$|(?:[\w~/.-]+ )?#)(?: (.*))?$/.exec(line) ?? [];
    if (prompt === undefined) {
      const step = steps.at(-1);
      if (!step) throw new Error(`a console block begins with a prompt, not with '${line}'`);
      step.output += `${line}\n`;
    } else if (command) steps.push({ prompt: `${prompt} `, command, output: '' });
    else last = `${prompt} `;
  }
  return { steps, last };
}

/**
 * What a program's output must hold, in this order: the comments at the end of lines that begin with `console.log(`,
 * whatever the blanks, and with anything for `…`.
 */
export function printedPattern(code: string): RegExp {
  const comments = [...code.matchAll(/^ *console\.log\(.*\); \/\/ (.*)$/gm)].map(([, comment = '']) => comment);
  const words = comments.map((comment) =>
    comment
      .trim()
      .split(/\s+/)
      .map((word) => (word === '…' ? '[^]*?' : literally(word))),
  );
  return new RegExp(words.map((comment) => comment.join('\\s+')).join('[^]*?'));
}

const literally = (text: string) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

/** What output must look like: as written, but for numbers, and with anything where there is a line of `…` or `...`. */
export function outputPattern(output: string): RegExp {
  const lines = output.trim().split('\n');
  const patterns = lines.map((line) =>
    /^(…|\.\.\.)$/.test(line.trim()) ? '[^]*?' : literally(line).replace(/\d+/g, '\\d+'),
  );
  return new RegExp(`^${patterns.join('\\n')}$`);
}
