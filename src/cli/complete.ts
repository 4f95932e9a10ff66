import { COMMANDS, type Command, nameOf } from './commands.js';
import { listMachines } from './machines/machine-folder.js';
import { yargs } from './yargs.js';

/** What yargs knows of a command's options, by its methods for its own parts. */
interface Inside {
  getOptions(): {
    readonly key: Readonly<Record<string, unknown>>;
    readonly choices: Readonly<Record<string, readonly string[]>>;
    readonly boolean: readonly string[];
  };
  getInternalMethods(): {
    getUsageInstance(): { getDescriptions(): Readonly<Record<string, string | undefined>> };
  };
}

/** A word that may stand where the cursor is, and what it means. */
type Suggestion = readonly [word: string, meaning: string];

/**
 * For a shell: prints the words that may stand where the last of these is, one a line, each with a tab and its meaning.
 * @param words of the command line so far, without the program; the last one is unfinished, perhaps empty
 */
export async function complete(words: readonly string[]): Promise<void> {
  const unfinished = words.at(-1) ?? '';
  const suggestions = await suggest(words.slice(0, -1), unfinished.startsWith('-'));
  const fitting = suggestions.filter(([word]) => word.startsWith(unfinished));
  process.stdout.write(fitting.map(([word, meaning]) => `${word}\t${meaning.replace(/\s+/g, ' ')}\n`).join(''));
}

async function suggest(before: readonly string[], wantsOption: boolean): Promise<Suggestion[]> {
  const [name, ...rest] = before;
  if (name === undefined) return COMMANDS.map((command) => [nameOf(command), command.describe]);
  const command = COMMANDS.find((it) => nameOf(it) === name);
  if (!command || rest.includes('--')) return [];
  const parser = yargs([]);
  await command.declare(parser);
  const { getOptions, getInternalMethods } = parser as unknown as Inside;
  const { key, choices, boolean } = getOptions.call(parser);
  const meanings = getInternalMethods.call(parser).getUsageInstance().getDescriptions();

  const option = rest.at(-1) ?? '';
  const optionName = option.replace(/^--?/, '');
  if (option.startsWith('-') && optionName in key && !boolean.includes(optionName)) {
    return (choices[optionName] ?? []).map((choice) => [choice, '']);
  }
  const positionals = [...command.usage.matchAll(/[<[](\w+)/g)].map(([, word]) => word as string);
  const words = wantsOption ? undefined : await positionalOf(command, rest, positionals, choices, boolean);
  if (words) return words;
  return Object.keys(key)
    .filter((word) => word.length > 1 && !positionals.includes(word))
    .map((word): Suggestion => [`--${word}`, (meanings[word] ?? '').replace('__yargsString__:', '')]);
}

/** What the next word may be that belongs to no option; nothing if it is a file, undefined if there is none. */
async function positionalOf(
  { usage }: Command,
  rest: readonly string[],
  positionals: readonly string[],
  choices: Readonly<Record<string, readonly string[]>>,
  boolean: readonly string[],
): Promise<Suggestion[] | undefined> {
  const takesValue = (word = '') =>
    word.startsWith('-') && !word.includes('=') && !boolean.includes(word.replace(/^--?/, ''));
  const given = rest.filter((word, index) => !word.startsWith('-') && !takesValue(rest[index - 1])).length;
  const wanted = positionals[given];
  if (wanted === undefined) return undefined;
  if (wanted === 'name') return (await machineNames()).map((name) => [name, 'machine']);
  // bash takes NAME: for two words: there is nothing to offer after it.
  if (usage.startsWith('cp ')) return (await machineNames()).map((name) => [`${name}:`, 'machine']);
  return (choices[wanted] ?? []).map((choice) => [choice, '']);
}

async function machineNames(): Promise<string[]> {
  const { running, failed } = await listMachines();
  return [...running, ...failed];
}
