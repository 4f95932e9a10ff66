/** For yargs: an option of text that may be given several times. @param otherwise what it is when it is not given */
export function repeatable(describe: string, otherwise = 'none') {
  return {
    type: 'string',
    array: true,
    nargs: 1,
    requiresArg: true,
    default: [] as string[],
    defaultDescription: otherwise,
    describe,
  } as const;
}
