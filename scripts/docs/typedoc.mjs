import { readFileSync } from 'node:fs';

const root = new URL('../../', import.meta.url);
const { exports } = JSON.parse(readFileSync(new URL('package.json', root), 'utf8'));

/** The sources of what package.json exports. */
const entryPoints = Object.values(exports)
  .flatMap(({ types }) => types ?? [])
  .map((types) => new URL(types.replace(/^\.\/dist\/(.*)\.d\.ts$/, 'src/$1.ts'), root).pathname);

/** @type {import('typedoc').TypeDocOptions & import('typedoc-plugin-markdown').PluginOptions} */
export default {
  plugin: ['typedoc-plugin-markdown'],
  entryPoints,
  tsconfig: new URL('tsconfig.json', root).pathname,
  out: new URL('docs/api', root).pathname,
  name: 'API of tsvisor',
  readme: 'none',
  router: 'module',
  modulesFileName: 'README',
  entryFileName: 'README',
  includeVersion: false,
  disableSources: true,
  excludePrivate: true,
  excludeInternal: true,
  excludeExternals: true,
  hidePageHeader: true,
  hideBreadcrumbs: true,
  useCodeBlocks: true,
  parametersFormat: 'table',
  propertiesFormat: 'table',
  interfacePropertiesFormat: 'table',
  classPropertiesFormat: 'table',
  typeAliasPropertiesFormat: 'table',
  // What is exported has a docstring, and what a docstring links to is there.
  requiredToBeDocumented: ['Class', 'Interface', 'TypeAlias', 'Function', 'Variable', 'Enum', 'Method', 'Accessor'],
  validation: { notExported: true, invalidLink: true, notDocumented: true },
  treatValidationWarningsAsErrors: true,
};
