#!/usr/bin/env bash
# Runs a command on a throw-away machine that has two RoCE v2 ports, without any RDMA hardware.
#
#     scripts/roce_lab.sh [-e qemu|uml] [-t SECONDS] [-m MB] [-c CPUS] [-o FOLDER] [--] COMMAND [ARGUMENT...]
#     scripts/roce_lab.sh [-e qemu|uml] -p          only makes what it needs, or says why it cannot be had
#     scripts/roce_lab.sh -- ibv_devices
#     scripts/roce_lab.sh -- roce-mpirun .venv/bin/python -m rwkvmpi score MODEL TEXT -o /tmp/run --ring 2
#
# A Linux kernel of its own is started on a view of this machine's files, so COMMAND runs in the same folder with the same
# Python. What it writes is lost, but for files in $ROCE_LAB_OUT, which are copied to FOLDER (-o) at the end. Inside are
#     rxe0 on v0, 10.77.0.1  <- two switches ->  rxe1 on v1, 10.77.0.2    (Soft-RoCE, MTU 4200, GID index 1)
#     roce-mpirun PROGRAM...      two ranks, rank 0 on rxe0 and rank 1 on rxe1 (scripts/_roce_mpirun.sh)
#     roce-fault FAULT...         loss, delay, a cut cable and others (scripts/_roce_faults.py)
#
# -e qemu   Debian's kernel in QEMU: with KVM where that works, else emulated, which wants idle cores
# -e uml    Debian's kernel built as user-mode Linux, once, in some minutes: native speed, one CPU, slow page faults.
#           Without -e: uml where it has been built, else qemu.
# -t 600    seconds that COMMAND may take     -m 4096  MB of memory     -c 2  CPUs (qemu)
#
# Exit code: that of COMMAND; 124 out of time; 125 the laboratory itself failed; 126 it cannot be had here, and why.
# Needs Debian 12 or newer on x86-64, root and apt. It keeps what it made in ROCE_LAB_CACHE (/var/cache/rwkvmpi-roce-lab).
set -Eeuo pipefail

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=${ROCE_LAB_CACHE:-/var/cache/rwkvmpi-roce-lab}
engine='' limit=600 memory=4096 cpus=2 out='' only_prepare=''

say() { printf 'roce_lab: %s\n' "$*" >&2; }
failed() { say "$*" && exit 125; }
cannot() { say "cannot be had here: $*" && exit 126; }
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2 && exit 125; }

while getopts ":pe:t:m:c:o:" option; do
    case $option in
        e) engine=$OPTARG ;;
        t) limit=$OPTARG ;;
        m) memory=$OPTARG ;;
        c) cpus=$OPTARG ;;
        o) out=$OPTARG ;;
        p) only_prepare=1 ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || [ -n "$only_prepare" ] || usage
[ -n "$engine" ] || engine=$([ -x "$CACHE/linux-uml" ] && echo uml || echo qemu)
[ "$engine" = qemu ] || [ "$engine" = uml ] || failed "-e $engine: the engines are qemu and uml"
for number in "$limit" "$memory" "$cpus"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || failed "$number: -t, -m and -c take whole numbers from 1 on"
done
trap 'failed "a step failed: ${BASH_SOURCE[0]##*/}, line $LINENO"' ERR

# shellcheck source=scripts/_roce_prepare.sh
source "$SCRIPTS/_roce_prepare.sh"
begun=$SECONDS
prepare
prepared=$((SECONDS - begun))
[ -z "$only_prepare" ] || exit 0

# --- the folder that both machines see

lab=$(mktemp -d "${TMPDIR:-/tmp}/roce-lab.XXXXXX")
machine=
tidy() {
    [ -z "$machine" ] || kill "$machine" 2>/dev/null || true
    [ -z "$machine" ] || wait "$machine" 2>/dev/null || true
    rm -rf --one-file-system "$lab"
}
trap tidy EXIT
trap 'exit 130' INT TERM

mkdir "$lab/out" "$lab/bin"
cp "$SCRIPTS/_roce_guest.sh" "$lab/guest"
ln -s "$SCRIPTS/_roce_mpirun.sh" "$lab/bin/roce-mpirun"
ln -s "$SCRIPTS/_roce_faults.py" "$lab/bin/roce-fault"
{
    declare -px | grep -E '^declare -x (PATH|VIRTUAL_ENV|PYTHON[A-Z]*|LANG|OMP_NUM_THREADS|(RWKVMPI|UCX|ROCE)_[A-Z_]*)=' || true
    printf 'export ROCE_LAB=%q PATH=/run/lab/bin:$PATH\ncd %q\nexec' "$engine" "$PWD"
    printf ' %q' "$@"
    echo
} >"$lab/command"
: >"$lab/output"

# --- the machine

emulator() {
    local shared=security_model=none,multidevs=remap line="console=ttyS0 quiet panic=-1 mitigations=off nokaslr nopti"
    local processor=(-accel tcg,thread=multi,tb-size=512 -cpu max)
    if [ "$(accelerator)" = kvm ]; then
        processor=(-accel kvm -cpu host)
    else
        line+=" tsc=unstable" # calibrated on a busy machine the emulated counter runs at a wrong speed
    fi
    boot=(
        qemu-system-x86_64 "${processor[@]}" -m "$memory" -smp "$cpus" -nodefaults -display none -no-reboot -serial stdio
        -virtfs "local,path=/,mount_tag=host,readonly=on,$shared"
        -virtfs "local,path=$PACKAGES,mount_tag=packages,readonly=on,$shared"
        -virtfs "local,path=$KERNEL,mount_tag=kernel,readonly=on,$shared"
        -virtfs "local,path=$lab,mount_tag=lab,$shared" -device virtio-rng-pci
        -kernel "$KERNEL/image" -initrd "$KERNEL/initramfs" -append "$line"
    )
}

user_mode() {
    cat >"$lab/init" <<END
#!/bin/bash
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /mnt && cd /mnt && mkdir host packages upper work root
mount -t hostfs -o / host host && mount -t hostfs -o "$PACKAGES" packages packages
mount -t overlay -o lowerdir=packages:host,upperdir=upper,workdir=work overlay root && cd root
for folder in proc sys dev; do mount --move /\$folder \$folder; done
mount -t tmpfs tmpfs run && mkdir -p run/lab && mount -t hostfs -o "$lab" lab run/lab
exec chroot . /bin/bash /run/lab/guest
END
    chmod +x "$lab/init"
    boot=("$USER_MODE" "mem=${memory}M" rootfstype=hostfs rootflags=/ ro quiet con=null con0=null,fd:1 "init=$lab/init")
}

if [ "$engine" = uml ]; then user_mode; else emulator; fi
code=0
timeout --kill-after 5 "$limit" "${boot[@]}" </dev/null >"$lab/console" 2>&1 9>&- &
machine=$!
tail --pid="$machine" -n +1 -s 0.2 -f "$lab/output" 9>&- &
printer=$!
wait "$machine" || code=$?
machine=
wait "$printer" || true
[ -z "$out" ] || { mkdir -p "$out" && cp -a "$lab/out/." "$out/"; }
say "$engine: prepared in $prepared s, ports up after $(cat "$lab/ready" 2>/dev/null || echo ?) s, $((SECONDS - begun)) s in all"
if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    say "out of time: $limit s; its console said last:" && tail -n 15 "$lab/console" >&2
    exit 124
fi
if [ ! -s "$lab/status" ]; then
    say "the machine ended without a word from the command (exit code $code); its console:" && tail -n 30 "$lab/console" >&2
    exit 125
fi
exit "$(cat "$lab/status")"
