# shellcheck shell=bash
# Shared by the build scripts in this folder; sourced, not run.
# Everything but the result's path goes to stderr.

program=${0##*/}
program=${program%.sh}

die() {
  printf '%s: %s\n' "$program" "$*" >&2
  exit 1
}

note() { printf '%s: %s\n' "$program" "$*" >&2; }

default_cache() {
  printf '%s/tsvisor' "${XDG_CACHE_HOME:-${HOME:?is not set}/.cache}"
}

# need COMMAND PACKAGE [COMMAND PACKAGE]...: one error that names all that is missing.
need() {
  local commands=() packages=()
  while (($#)); do
    if ! command -v "$1" >/dev/null; then
      commands+=("$1")
      packages+=("$2")
    fi
    shift 2
  done
  ((${#commands[@]} == 0)) ||
    die "missing: ${commands[*]}. Install with: apt-get install ${packages[*]}"
}

# The first 16 hex digits of the SHA-256 of stdin.
short_hash() {
  local sum
  sum=$(sha256sum)
  printf '%s' "${sum:0:16}"
}

compiler_version() {
  local text
  text=$(gcc --version)
  printf '%s\n' "${text%%$'\n'*}"
}
