#!/usr/bin/env bash
# Builds the initramfs: Debian's static busybox, our init, a few files.
# Prints its path. The result is cached by content.
set -euo pipefail
exec </dev/null

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
# shellcheck source-path=SCRIPTDIR source=userland.sh
. "$here/userland.sh"

usage() {
  cat <<EOF
Usage: build-initramfs.sh [--busybox FILE] [--output-cache DIR]

  --busybox FILE      a static busybox (default: /bin/busybox, Debian package
                      busybox-static)
  --output-cache DIR  where results are kept (default: \$XDG_CACHE_HOME/tsvisor)

Prints the path of an uncompressed newc cpio archive.
EOF
}

busybox=/bin/busybox
cache=
while (($#)); do
  case $1 in
    --busybox | --output-cache)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --busybox) busybox=$2 ;;
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
cache=${cache:-$(default_cache)}/initramfs

check_busybox "$busybox"
need gcc gcc sha256sum coreutils flock util-linux
agent=$("$here/build-agent.sh") || exit

key=$({
  compiler_version
  cat "$busybox" "$here"/init/* "$agent" "$here/common.sh" "$here/userland.sh" "$here/build-initramfs.sh"
} | short_hash)
mkdir -p "$cache"
result=$(cd "$cache" && pwd)/$key

done_already() {
  [[ -f $result/initramfs.cpio ]] || return 1
  printf '%s\n' "$result/initramfs.cpio"
}

if done_already; then exit; fi

need node nodejs

exec 9>"$result.lock"
flock 9
if done_already; then exit; fi

make_work "$result"

build_userland "$work" "$busybox" "$agent"

# As little as possible: unpacking an entry costs the guest about 10 ms on an
# interpreting host. What init can make itself in 2 ms, it does.
cat >"$work/manifest" <<'EOF'
dir dev 755
char dev/console 600 5 1
dir bin 755
file bin/busybox 755 busybox
file bin/tsvisor-agent 755 tsvisor-agent
dir etc 755
file etc/passwd 644 passwd
file etc/group 644 group
file etc/profile 644 profile
file etc/applets 644 applets
file init 755 init
EOF

mkdir "$work/result"
(cd "$work" && node "$here/init/cpio.mjs" manifest >result/initramfs.cpio) ||
  die "cannot write the archive"
sync "$work/result/initramfs.cpio"
mv -T "$work/result" "$result"
note "built the initramfs"
done_already
