# shellcheck shell=bash
# Shared by the scripts that build a user space; sourced after common.sh.
# shellcheck disable=SC2154 # $here is the script's

# make_work RESULT: a new folder beside it, in $work, that goes when the script ends.
make_work() {
  rm -rf "$1".build.* # left by a build that was killed
  work=$(mktemp -d "$1.build.XXXXXX")
  trap 'rm -rf "$work"' EXIT
}

check_busybox() {
  if [[ ! -r $1 ]]; then
    [[ $1 == /bin/busybox ]] &&
      die "no busybox at $1. Install with: apt-get install busybox-static"
    die "cannot read $1"
  fi
}

# build_userland DIR BUSYBOX AGENT: init, the agent, busybox, the list of its applets,
# and the files of /etc, all directly in DIR.
build_userland() {
  local dir=$1 busybox=$2 agent=$3 headers
  need ld binutils readelf binutils
  headers=$(LC_ALL=C readelf -lW "$busybox" 2>/dev/null) || die "$busybox is not an ELF program"
  [[ $headers != *INTERP* ]] ||
    die "$busybox is dynamically linked. Install with: apt-get install busybox-static"

  # One page-aligned segment each for code and data, no C library, no extras:
  # every page of init that the guest touches is a page fault.
  gcc -O2 -Wall -Wextra -ffreestanding -fno-stack-protector -fno-pie \
    -fno-asynchronous-unwind-tables -static -no-pie -nostdlib -s \
    -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-z,noexecstack \
    -o "$dir/init" "$here/init/init.c" || die "cannot compile init.c"

  cp "$agent" "$dir/tsvisor-agent"
  "$busybox" --list | grep -vxE 'busybox|init|linuxrc' >"$dir/applets"
  cp "$busybox" "$dir/busybox"
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$dir/passwd"
  printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >"$dir/group"
  # As functions these need no new process, and signal init as the commands do;
  # read keeps the prompt from coming back meanwhile.
  cat >"$dir/profile" <<'EOF'
poweroff() { kill -USR2 1; read -r _; }
halt() { kill -USR1 1; read -r _; }
reboot() { kill -TERM 1; read -r _; }
EOF
}
