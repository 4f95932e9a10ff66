#!/usr/bin/env bash
# Builds a guest kernel (vmlinux, uncompressed ELF) and prints its path.
# The result is cached by content; a second run only looks it up.
set -euo pipefail
exec </dev/null

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

usage() {
  cat <<EOF
Usage: build-kernel.sh [--flavour NAME] [--source TARBALL] [--output-cache DIR]

  --flavour NAME      a kernel/NAME.config of this folder (default: tiny)
  --source TARBALL    Linux source (default: /usr/src/linux-source-6.1.tar.xz,
                      Debian package linux-source-6.1)
  --output-cache DIR  where results are kept (default: \$XDG_CACHE_HOME/tsvisor)

Prints the path of vmlinux. System.map and config lie beside it.
EOF
}

flavour=tiny
source=/usr/src/linux-source-6.1.tar.xz
cache=
while (($#)); do
  case $1 in
    --flavour | --source | --output-cache)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --flavour) flavour=$2 ;;
        --source) source=$2 ;;
        --output-cache) cache=$2 ;;
      esac
      shift 2
      ;;
    -h | --help)
      usage
      exit
      ;;
    *) die "unknown argument: $1 (see --help)" ;;
  esac
done
cache=${cache:-$(default_cache)}/kernel

# --- what goes in

if [[ $flavour == base || ! $flavour =~ ^[a-z0-9-]+$ || ! -f $here/kernel/$flavour.config ]]; then
  known=$(cd "$here/kernel" && printf '%s\n' *.config | sed 's/\.config$//; /^base$/d' | paste -sd ' ')
  die "no flavour named '$flavour'; known: $known"
fi
if [[ ! -r $source ]]; then
  [[ $source == /usr/src/linux-source-6.1.tar.xz ]] &&
    die "no kernel source at $source. Install with: apt-get install linux-source-6.1"
  die "cannot read $source"
fi
need gcc gcc sha256sum coreutils flock util-linux

# base, then every prefix of the name that is a fragment: tiny-smp is base + tiny + tiny-smp.
# Fragments may have compiler flags beside them, in NAME.cflags, and options' definitions, in NAME.kconfig.
fragments=("$here/kernel/base.config")
cflags=()
kconfigs=()
prefix=
for part in ${flavour//-/ }; do
  prefix=${prefix:+$prefix-}$part
  [[ ! -f $here/kernel/$prefix.config ]] || fragments+=("$here/kernel/$prefix.config")
  [[ ! -f $here/kernel/$prefix.cflags ]] || cflags+=("$here/kernel/$prefix.cflags")
  [[ ! -f $here/kernel/$prefix.kconfig ]] || kconfigs+=("$here/kernel/$prefix.kconfig")
done

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# Hashing the tarball takes half a second, so its hash is remembered by size and time.
source_hash() {
  local stamp memo=$cache/source-hashes hash known
  stamp=$(stat -L -c '%s %Y %n' "$source")
  if [[ -f $memo ]]; then
    while read -r hash known; do
      if [[ $known == "$stamp" ]]; then
        printf '%s' "$hash"
        return
      fi
    done <"$memo"
  fi
  hash=$(sha256sum <"$source")
  hash=${hash%% *}
  printf '%s %s\n' "$hash" "$stamp" >"$memo.$$"
  mv "$memo.$$" "$memo"
  printf '%s' "$hash"
}

key=$({
  source_hash
  compiler_version
  cat "${fragments[@]}" "${cflags[@]}" "${kconfigs[@]}" "$here/kernel/no-cold.h" \
    "$here/common.sh" "$here/build-kernel.sh"
} | short_hash)
result=$cache/$flavour-$key

done_already() {
  [[ -f $result/vmlinux ]] || return 1
  printf '%s\n' "$result/vmlinux"
}

if done_already; then exit; fi

# --- build

need make make flex flex bison bison bc bc ld binutils tar tar
[[ $source != *.xz ]] || need xz xz-utils
printf '#include <gelf.h>\n' | gcc -E - >/dev/null 2>&1 ||
  die "missing: gelf.h. Install with: apt-get install libelf-dev"

exec 9>"$cache/.$flavour-$key.lock"
if ! flock -n 9; then
  note "waiting for another build of the same kernel"
  flock 9
fi
if done_already; then exit; fi

log=$cache/$flavour-$key.log
: >"$log"
rm -rf "$cache/.build-$flavour-$key".* # left by a build that was killed
work=$(mktemp -d "$cache/.build-$flavour-$key.XXXXXX")
job=
clean_up() {
  local status=$?
  trap - EXIT
  [[ -z $job ]] || kill "$job" 2>/dev/null || true
  rm -rf "$work"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

started=$SECONDS
expected=$(cat "$cache/$flavour.objects" 2>/dev/null || printf 930)

report() { # TEXT: replaces the progress line of a terminal
  local text
  text="kernel $flavour: $1, $((SECONDS - started)) s"
  if [[ -t 2 ]]; then printf '\r\033[K%s' "$text" >&2; fi
}

# step TEXT COMMAND...: runs it with its output in the log, showing progress.
step() {
  local text=$1 compiled ticks=0
  shift
  [[ -t 2 ]] || note "$text"
  "$@" >>"$log" 2>&1 9>&- &
  job=$!
  while kill -0 "$job" 2>/dev/null; do
    if [[ $text == compiling ]]; then
      compiled=$(grep -cE '^  (CC|AS) ' "$log" || true)
      report "compiling, $compiled of about $expected objects"
      if [[ ! -t 2 ]] && ((++ticks % 120 == 0)); then
        note "compiled $compiled of about $expected objects"
      fi
    else
      report "$text"
    fi
    sleep 0.5
  done
  if ! wait "$job"; then
    job=
    [[ ! -t 2 ]] || printf '\n' >&2
    tail -n 25 "$log" >&2
    die "$text failed; the whole log is $log"
  fi
  job=
}

build() {
  # A caller's make or environment must not leak into the result.
  env -u MAKEFLAGS -u MAKELEVEL -u KCFLAGS -u KAFLAGS -u LOCALVERSION -u KBUILD_OUTPUT \
    LC_ALL=C KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970' \
    KBUILD_BUILD_USER=tsvisor KBUILD_BUILD_HOST=tsvisor KBUILD_BUILD_VERSION=1 \
    nice make -C "$work/linux" ARCH=x86_64 "$@"
}

unpack() {
  mkdir "$work/linux"
  tar -xf "$source" -C "$work/linux" --strip-components=1
  cp "$here/kernel/no-cold.h" "$work/linux/include/tsvisor-no-cold.h"
}

configure() {
  cat /dev/null "${kconfigs[@]}" >"$work/linux/Kconfig.tsvisor"
  sed -i '/^mainmenu /a source "Kconfig.tsvisor"' "$work/linux/Kconfig"
  build tinyconfig
  (cd "$work/linux" && scripts/kconfig/merge_config.sh -m .config "${fragments[@]}")
  build olddefconfig
}

# Kconfig drops what it cannot grant without an error.
check_config() {
  local line name wanted have refused=()
  declare -A want=() got=()
  while read -r line; do
    if [[ $line =~ ^(CONFIG_[A-Z0-9a-z_]+)=(.*)$ ]]; then
      want[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    elif [[ $line =~ ^#\ (CONFIG_[A-Z0-9a-z_]+)\ is\ not\ set$ ]]; then
      want[${BASH_REMATCH[1]}]=n
    fi
  done < <(cat "${fragments[@]}")
  while IFS='=' read -r name have; do
    got[$name]=$have
  done < <(grep '^CONFIG_' "$work/linux/.config")
  for name in "${!want[@]}"; do
    wanted=${want[$name]}
    have=${got[$name]:-n}
    [[ $wanted == "$have" ]] || refused+=("$name=$wanted (is $have)")
  done
  ((${#refused[@]} == 0)) ||
    die "this source's Kconfig did not grant: $(printf '%s\n' "${refused[@]}" | sort | paste -sd ' ')"
}

compile() {
  local flags
  flags=$(cat /dev/null "${cflags[@]}" | grep -v '^#' | paste -sd ' ' || true)
  build -j"$(nproc)" KCFLAGS="$flags" vmlinux
}

collect() {
  mkdir "$work/result"
  strip --strip-all -o "$work/result/vmlinux" "$work/linux/vmlinux"
  cp "$work/linux/System.map" "$work/result/System.map"
  cp "$work/linux/.config" "$work/result/config"
  chmod 644 "$work/result"/*
  sync "$work/result"/*
}

step unpacking unpack
step configuring configure
check_config
step compiling compile
step collecting collect
mv -T "$work/result" "$result"
grep -cE '^  (CC|AS) ' "$log" >"$cache/$flavour.objects" || true

[[ ! -t 2 ]] || printf '\r\033[K' >&2
note "built $flavour in $((SECONDS - started)) s"
done_already
