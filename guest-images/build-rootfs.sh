#!/usr/bin/env bash
# Builds an ext4 image of a root file system: Debian's static busybox and our
# init. Prints its path. The result is cached by content; it is a template, to
# be copied or given an overlay, not written to.
set -euo pipefail
exec </dev/null

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"
# shellcheck source-path=SCRIPTDIR source=userland.sh
. "$here/userland.sh"

usage() {
  cat <<EOF
Usage: build-rootfs.sh [--size SIZE] [--busybox FILE] [--output-cache DIR]

  --size SIZE         of the file system, like 512M or 4G (default: 256M)
  --busybox FILE      a static busybox (default: /bin/busybox, Debian package
                      busybox-static)
  --output-cache DIR  where results are kept (default: \$XDG_CACHE_HOME/tsvisor)

Prints the path of a raw image, a sparse file. Boot from a copy of it, or with
an overlay, and root=/dev/vda rw on the kernel's command line.
EOF
}

busybox=/bin/busybox
size=256M
cache=
while (($#)); do
  case $1 in
    --busybox | --output-cache | --size)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --busybox) busybox=$2 ;;
        --output-cache) cache=$2 ;;
        --size) size=$2 ;;
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
[[ $size =~ ^[1-9][0-9]{0,5}[MG]$ ]] || die "--size: '$size' is not like 512M or 4G"
cache=${cache:-$(default_cache)}/rootfs
PATH=$PATH:/usr/sbin:/sbin # where Debian has mkfs.ext4

check_busybox "$busybox"
need gcc gcc sha256sum coreutils flock util-linux
agent=$("$here/build-agent.sh") || exit

key=$({
  compiler_version
  echo "$size"
  cat "$busybox" "$here"/init/* "$agent" "$here/common.sh" "$here/userland.sh" "$here/build-rootfs.sh"
} | short_hash)
mkdir -p "$cache"
result=$(cd "$cache" && pwd)/$key

done_already() {
  [[ -f $result/rootfs.ext4 ]] || return 1
  printf '%s\n' "$result/rootfs.ext4"
}

if done_already; then exit; fi

need mkfs.ext4 e2fsprogs debugfs e2fsprogs

exec 9>"$result.lock"
flock 9
if done_already; then exit; fi

make_work "$result"
build_userland "$work" "$busybox" "$agent"

# Unlike the initramfs, complete: init finds nothing left to make.
root=$work/root
mkdir -p "$root"/{bin,dev,etc,mnt,proc,root,run,sys,tmp,usr,var}
chmod 755 "$root"
chmod 700 "$root/root"
chmod 1777 "$root/tmp"
install -m 755 "$work"/{busybox,init,tsvisor-agent} "$root/bin"
install -m 644 "$work"/{passwd,group,profile} "$root/etc"
while read -r applet; do
  ln "$root/bin/busybox" "$root/bin/$applet"
done < <(grep -vxE 'poweroff|halt|reboot' "$work/applets")
for name in poweroff halt reboot milestone debug-exit; do
  ln "$root/bin/init" "$root/bin/$name"
done
ln -s bin "$root/sbin"
ln -s ../bin "$root/usr/bin"
ln -s ../bin "$root/usr/sbin"

mkdir "$work/result"
image=$work/result/rootfs.ext4
mkfs.ext4 -q -L tsvisor-root -b 4096 -m 0 -d "$root" \
  -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard "$image" "$size" >/dev/null ||
  die "cannot make a file system of $size"
# What a builder that is not root owns belongs to root in the guest.
if [[ $(id -u) != 0 ]]; then
  (cd "$root" && find . -mindepth 1 -printf '/%P\n') |
    sed 's|.*|sif "&" uid 0\nsif "&" gid 0|' |
    debugfs -w -f - "$image" >/dev/null 2>"$work/debugfs.log" ||
    die "cannot set the owners: $(tail -n 1 "$work/debugfs.log")"
fi
chmod 444 "$image"
sync "$image"
mv -T "$work/result" "$result"
note "built the root file system"
done_already
