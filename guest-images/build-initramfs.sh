#!/usr/bin/env bash
# Builds the initramfs: Debian's static busybox, our init, a few files.
# Prints its path. The result is cached by content.
set -euo pipefail
exec </dev/null

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

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

if [[ ! -r $busybox ]]; then
  [[ $busybox == /bin/busybox ]] &&
    die "no busybox at $busybox. Install with: apt-get install busybox-static"
  die "cannot read $busybox"
fi
need gcc gcc sha256sum coreutils flock util-linux

key=$({
  compiler_version
  cat "$busybox" "$here"/init/* "$here/common.sh" "$here/build-initramfs.sh"
} | short_hash)
mkdir -p "$cache"
result=$(cd "$cache" && pwd)/$key

done_already() {
  [[ -f $result/initramfs.cpio ]] || return 1
  printf '%s\n' "$result/initramfs.cpio"
}

if done_already; then exit; fi

need node nodejs ld binutils readelf binutils
headers=$(LC_ALL=C readelf -lW "$busybox" 2>/dev/null) || die "$busybox is not an ELF program"
[[ $headers != *INTERP* ]] ||
  die "$busybox is dynamically linked. Install with: apt-get install busybox-static"

exec 9>"$result.lock"
flock 9
if done_already; then exit; fi

rm -rf "$result".build.* # left by a build that was killed
work=$(mktemp -d "$result.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# One page-aligned segment each for code and data, no C library, no extras:
# every page of init that the guest touches is a page fault.
gcc -O2 -Wall -Wextra -ffreestanding -fno-stack-protector -fno-pie \
  -fno-asynchronous-unwind-tables -static -no-pie -nostdlib -s \
  -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-z,noexecstack \
  -o "$work/init" "$here/init/init.c" || die "cannot compile init.c"

"$busybox" --list | grep -vxE 'busybox|init|linuxrc' >"$work/applets"
cp "$busybox" "$work/busybox"
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$work/passwd"
printf 'root:x:0:\ntty:x:5:\n' >"$work/group"
# As functions these need no new process, and signal init as the commands do;
# read keeps the prompt from coming back meanwhile.
cat >"$work/profile" <<'EOF'
poweroff() { kill -USR2 1; read -r _; }
halt() { kill -USR1 1; read -r _; }
reboot() { kill -TERM 1; read -r _; }
EOF

# As little as possible: unpacking an entry costs the guest about 10 ms on an
# interpreting host. What init can make itself in 2 ms, it does.
cat >"$work/manifest" <<'EOF'
dir dev 755
char dev/console 600 5 1
dir bin 755
file bin/busybox 755 busybox
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
