#!/usr/bin/env bash
# Builds the guest agent, a static program, and prints its path. The result is
# cached by content.
set -euo pipefail
exec </dev/null

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

usage() {
  cat <<EOT
Usage: build-agent.sh [--sanitize] [--output-cache DIR]

  --sanitize          with AddressSanitizer and UBSan and the host's C library,
                      for tests on the host
  --output-cache DIR  where results are kept (default: \$XDG_CACHE_HOME/tsvisor)
EOT
}

cache=
kind=agent
while (($#)); do
  case $1 in
    --output-cache)
      (($# > 1)) || die "$1 needs a value"
      cache=$2
      shift 2
      ;;
    --sanitize)
      kind=sanitized
      shift
      ;;
    -h | --help)
      usage
      exit
      ;;
    *) die "unknown argument: $1 (see --help)" ;;
  esac
done
cache=${cache:-$(default_cache)}/agent
need gcc gcc sha256sum coreutils musl-gcc musl-tools

version=$(sed -n 's/^  "version": "\(.*\)",$/\1/p' "$here/../package.json")
key=$({
  compiler_version
  echo "$kind $version"
  cat "$here"/agent/* "$here/common.sh" "$here/build-agent.sh"
} | short_hash)
mkdir -p "$cache"
result=$(cd "$cache" && pwd)/$key/tsvisor-agent
if [[ -f $result ]]; then
  printf '%s\n' "$result"
  exit
fi

work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
flags=(-std=gnu17 -Wall -Wextra "-DAGENT_VERSION=\"$version\"")
case $kind in
  agent)
    # Small, and in few pages: each page that is unpacked or touched costs an
    # interpreted guest milliseconds. musl has no kernel headers of its own.
    musl-gcc "${flags[@]}" -Os -static -no-pie -fno-pie -s \
      -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-stack-protector \
      -Wl,--gc-sections -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-z,noexecstack \
      -idirafter /usr/include -idirafter "/usr/include/$(gcc -print-multiarch)" \
      -o "$work/tsvisor-agent" "$here"/agent/*.c || die "cannot compile the agent"
    ;;
  sanitized)
    gcc "${flags[@]}" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
      -o "$work/tsvisor-agent" "$here"/agent/*.c || die "cannot compile the agent"
    ;;
esac
mkdir -p "$cache/$key"
mv -T "$work/tsvisor-agent" "$result"
note "built the agent"
printf '%s\n' "$result"
