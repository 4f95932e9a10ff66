import type { ArgumentsCamelCase, Argv } from 'yargs';

const SHELLS = ['bash', 'zsh', 'fish'] as const;
type Shell = (typeof SHELLS)[number];

/** What each shell is told: it asks `tsvisor __complete WORDS` (complete.ts), and offers files where that says nothing. */
const SCRIPTS: Readonly<Record<Shell, string>> = {
  bash: `_tsvisor() {
  local lines
  mapfile -t lines < <("\${COMP_WORDS[0]}" __complete "\${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
  COMPREPLY=("\${lines[@]%%$'\\t'*}")
  if [[ \${COMPREPLY[0]-} == *: ]]; then compopt -o nospace; fi
}
complete -o default -F _tsvisor tsvisor
`,
  zsh: `#compdef tsvisor
_tsvisor() {
  local -a lines described
  local line
  lines=("\${(@f)$("\${words[1]}" __complete "\${(@)words[2,CURRENT]}" 2>/dev/null)}")
  for line in $lines; do
    [[ -n $line ]] && described+=("\${\${line%%$'\\t'*}//:/\\\\:}\${\${line#*$'\\t'}:+:\${line#*$'\\t'}}")
  done
  if (( $#described )); then _describe tsvisor described; else _files; fi
}
compdef _tsvisor tsvisor
`,
  fish: `function __tsvisor_complete
  set -l words (commandline -opc)
  set -l found ($words[1] __complete $words[2..] (commandline -ct) 2>/dev/null)
  if test (count $found) -gt 0
    printf '%s\\n' $found
  else
    __fish_complete_path (commandline -ct)
  end
end
complete -c tsvisor -f -a '(__tsvisor_complete)'
`,
};

export function builder(yargs: Argv) {
  return yargs
    .positional('shell', { choices: SHELLS, demandOption: true, describe: 'whose script it is' })
    .example('source <($0 completion bash)', 'in ~/.bashrc')
    .example('source <($0 completion zsh)', 'in ~/.zshrc, after compinit')
    .example('$0 completion fish >~/.config/fish/completions/tsvisor.fish', 'once')
    .epilogue('Completes commands, options, their choices and the names of machines.');
}

export function handler({ shell }: ArgumentsCamelCase<{ shell: Shell }>): void {
  process.stdout.write(SCRIPTS[shell]);
}
