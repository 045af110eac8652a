# shellcheck shell=bash
# Sourced by roce_lab.sh: makes what the laboratory starts from, once, in $CACHE.
#
#     prepare     sets KERNEL (a folder with image, initramfs and modules) or USER_MODE (a program), and PACKAGES
#
# Every part is made beside its place and moved there when it is whole. Its folder's name says what it was made from.

# What COMMAND finds beside this machine's own programs. pyverbs is for the system's Python; a virtual environment of the
# same version of Python can load it.
PARTS="ibverbs-utils ibverbs-providers librdmacm1 rdmacm-utils perftest python3-pyverbs iproute2 kmod"

prepare() {
    possible
    mkdir -p "$CACHE" 2>/dev/null || cannot "$CACHE cannot be written; name another folder in ROCE_LAB_CACHE"
    PACKAGES=$CACHE/packages-$(packages_key)
    KERNEL=$CACHE/kernel USER_MODE=$CACHE/linux-uml
    exec 9>"$CACHE/lock"
    flock -s 9 # held until the end: nobody clears away what this machine runs from
    while ! prepared; do
        flock 9
        prepared || make_missing
        flock -s 9
    done
}

prepared() {
    [ -d "$PACKAGES" ] && command -v busybox >/dev/null || return 1
    if [ "$engine" = uml ]; then
        [ -x "$USER_MODE" ]
    else
        [ -d "$KERNEL" ] && command -v qemu-system-x86_64 >/dev/null
    fi
}

make_missing() {
    need busybox:busybox-static
    if [ "$engine" = uml ]; then
        [ -x "$USER_MODE" ] || build_user_mode
    else
        need qemu-system-x86_64:qemu-system-x86 depmod:kmod cpio:cpio python3:python3-minimal
        [ -d "$KERNEL" ] || unpack_kernel
    fi
    PACKAGES=$CACHE/packages-$(packages_key) # which the programs just installed have changed
    [ -d "$PACKAGES" ] || unpack_packages
}

packages_key() { (echo "$PARTS" && dpkg-query -W) | sha256sum | cut -c 1-16; }

possible() {
    local release
    # shellcheck disable=SC1091
    release=$(. /etc/os-release 2>/dev/null && echo "${ID:-?} ${VERSION_ID:-0}") || true
    [[ $release =~ ^debian\ (1[2-9]|[2-9][0-9])$ ]] || cannot "it takes Debian's packages (12 or newer), and this is '$release'"
    [ "$(uname -m)" = x86_64 ] || cannot "it is for x86-64, and this is $(uname -m)"
    [ "$(id -u)" = 0 ] || cannot "it needs root, for apt and to see all files as they are"
    command -v apt-get >/dev/null || cannot "there is no apt-get"
}

# need PROGRAM:PACKAGE...    installs the packages of the programs that are missing
need() {
    local pair missing=()
    for pair; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    fetch "${missing[*]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "${missing[@]}"
}

# fetch WHAT COMMAND...    mirrors drop old packages: after a failure once more with a fresh index
fetch() {
    local what=$1 log=$CACHE/apt.log
    shift
    "$@" >"$log" 2>&1 && return
    apt-get update -qq >>"$log" 2>&1 && "$@" >>"$log" 2>&1 && return
    cannot "apt could not fetch $what ($(grep -m 1 '^E:' "$log" || tail -n 1 "$log"))"
}

# newest PACKAGE    the package with a version in its name that this one stands for
newest() {
    local found
    found=$(apt-cache depends "$1" 2>/dev/null | grep -om 1 'linux-[a-z]*-[0-9].*') ||
        { apt-get update -qq >/dev/null 2>&1 && found=$(apt-cache depends "$1" | grep -om 1 'linux-[a-z]*-[0-9].*'); } ||
        cannot "apt knows no package $1"
    echo "$found"
}

# Debian has /bin, /sbin and /lib in /usr; a package that still brings them must follow, or it would hide the links.
into_usr() {
    local name
    for name in bin sbin lib lib64; do
        [ -d "$1/$name" ] && [ ! -L "$1/$name" ] || continue
        mkdir -p "$1/usr/$name"
        cp -al "$1/$name/." "$1/usr/$name/"
        rm -r "${1:?}/$name"
    done
}

# --- what COMMAND finds

unpack_packages() {
    say "unpacking the RDMA packages"
    local new=$CACHE/packages.new debs=$CACHE/debs file
    rm -rf "$CACHE"/packages* "$debs"
    mkdir -p "$new/usr" "$debs/partial"
    # shellcheck disable=SC2086
    fetch "$PARTS" apt-get install --yes --no-install-recommends --download-only \
        -o Debug::NoLocking=1 -o "Dir::Cache::archives=$debs" $PARTS
    for file in "$debs"/*.deb; do
        case ${file##*/} in
            systemd* | udev_* | libsystemd* | libudev1_* | libpam-systemd* | libnss-systemd*) ;; # nothing here runs them
            *) dpkg-deb --extract "$file" "$new" ;;
        esac
    done
    into_usr "$new"
    rm -r "$debs"
    mv "$new" "$PACKAGES"
}

# --- the kernel for QEMU

unpack_kernel() {
    say "unpacking the kernel"
    local new=$CACHE/kernel.new name version
    rm -rf "$new" && mkdir -p "$new/deb"
    name=$(newest linux-image-amd64) || exit 126
    fetch "$name" env -C "$new/deb" apt-get download -o APT::Sandbox::User=root "$name"
    dpkg-deb --extract "$new"/deb/*.deb "$new" && rm -r "$new/deb"
    into_usr "$new"
    version=$(ls "$new/usr/lib/modules")
    depmod -b "$new/usr" "$version"
    bare_image "$new/boot/vmlinuz-$version" "$new/image"
    make_initramfs "$new" "$version"
    rm -rf "$KERNEL" && mv "$new" "$KERNEL"
}

# QEMU also starts the kernel without its compression, and unpacking it is slow work for an emulated processor.
bare_image() {
    python3 - "$1" "$2" <<'END'
import lzma, pathlib, sys

packed = pathlib.Path(sys.argv[1]).read_bytes()
start = packed.find(b"\xfd7zXZ\0")
try:
    image = lzma.LZMADecompressor().decompress(packed[start:]) if start >= 0 else b""
except lzma.LZMAError:
    image = b""
pathlib.Path(sys.argv[2]).write_bytes(image if image.startswith(b"\x7fELF") else packed)
END
}

# The first program puts the file system together: this machine's files, read only, under the packages and a memory disk.
make_initramfs() {
    local tree=$1/tree module
    mkdir -p "$tree/modules"
    cp "$(command -v busybox)" "$tree/busybox"
    for module in virtio_pci virtio_rng 9pnet_virtio 9p overlay; do
        modprobe -d "$1/usr" -S "$2" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        cp "$module" "$tree/modules/" && echo "${module##*/}"
    done >"$tree/order"
    cat >"$tree/init" <<'END'
#!/busybox sh
/busybox mkdir /bin && /busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /host /packages /kernel /memory /root
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod /modules/$module; done </order
for tag in host packages kernel; do
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose $tag /$tag
done
mount -t tmpfs -o size=70% tmpfs /memory; mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/packages:/kernel:/host,upperdir=/memory/upper,workdir=/memory/work overlay /root
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
mount -t tmpfs tmpfs /root/run; mkdir -p /root/run/lab
mount -t 9p -o rw,trans=virtio,version=9p2000.L,msize=512000,cache=none lab /root/run/lab
exec switch_root /root /bin/bash /run/lab/guest
END
    chmod +x "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1) >"$1/initramfs"
    rm -r "$tree"
}

# A /dev/kvm inside a virtual machine may be there and not run a kernel: it gets one try, and the answer is kept.
accelerator() {
    if [ ! -e "$CACHE/accelerator" ]; then
        local log=$CACHE/kvm.log answer=tcg
        if [ -w /dev/kvm ]; then
            say "trying KVM (8 s at most)"
            : >"$log"
            timeout 8 qemu-system-x86_64 -accel kvm -cpu host -m 512 -nodefaults -display none -no-reboot \
                -serial "file:$log" -kernel "$KERNEL/image" -append "console=ttyS0 panic=-1" >/dev/null 2>&1 || true
            grep -q 'Unable to mount root' "$log" && answer=kvm
        fi
        echo "$answer" >"$CACHE/accelerator"
    fi
    cat "$CACHE/accelerator"
}

# --- the kernel as a program

# What the laboratory needs of a kernel, on top of nothing at all.
USER_MODE_OPTIONS="
    64BIT EXPERT MULTIUSER HOSTFS BLOCK TTY UNIX98_PTYS PRINTK STDERR_CONSOLE SSL NULL_CHAN UML_RANDOM
    BINFMT_ELF BINFMT_SCRIPT FUTEX EPOLL EVENTFD SIGNALFD TIMERFD AIO POSIX_TIMERS HIGH_RES_TIMERS MEMBARRIER MEMFD_CREATE
    ADVISE_SYSCALLS SYSVIPC POSIX_MQUEUE CROSS_MEMORY_ATTACH NAMESPACES PID_NS IPC_NS UTS_NS NET_NS FILE_LOCKING
    PROC_FS PROC_SYSCTL SYSFS TMPFS TMPFS_XATTR SHMEM DEVTMPFS CONFIGFS_FS OVERLAY_FS
    NET UNIX PACKET INET IPV6 IP_ADVANCED_ROUTER IP_MULTIPLE_TABLES NETDEVICES NET_CORE VETH BRIDGE NET_SCHED NET_SCH_NETEM
    VIRTIO_UML UML_PCI_OVER_VIRTIO INFINIBAND INFINIBAND_USER_ACCESS INFINIBAND_USER_MAD INFINIBAND_ADDR_TRANS RDMA_RXE"

build_user_mode() {
    need gcc:gcc make:make flex:flex bison:bison bc:bc xz:xz-utils
    [ -e /usr/include/stdio.h ] || need stdio.h:libc6-dev
    say "building user-mode Linux, some minutes"
    local source=$CACHE/source name archive option
    rm -rf "$source" && mkdir -p "$source"
    name=$(newest linux-source) || exit 126
    fetch "$name" env -C "$source" apt-get download -o APT::Sandbox::User=root "$name"
    archive=usr/src/$name.tar.xz
    dpkg-deb --fsys-tarfile "$source"/*.deb | tar --extract --to-stdout "./$archive" | xz -dc |
        tar --extract --directory "$source" --strip-components 1 --exclude '*/Documentation/*.rst' \
            --exclude '*/drivers/gpu/*.[ch]' --exclude '*/drivers/media/*.[ch]' --exclude '*/sound/*.[ch]' \
            --exclude '*/drivers/net/ethernet/*.[ch]' --exclude '*/drivers/net/wireless/*.[ch]'
    for option in $USER_MODE_OPTIONS; do echo "CONFIG_$option=y"; done >"$source/laboratory"
    echo CONFIG_UML_PCI_OVER_VIRTIO_DEVICE_ID=1234 >>"$source/laboratory" # RDMA wants PCI, and this is the PCI there is
    (cd "$source" && make ARCH=um KCONFIG_ALLCONFIG=laboratory allnoconfig && nice make ARCH=um -j"$(nproc)" linux) \
        >"$CACHE/build.log" 2>&1 || failed "user-mode Linux could not be built; see $CACHE/build.log"
    grep -q '^CONFIG_RDMA_RXE=y' "$source/.config" || failed "user-mode Linux was built without Soft-RoCE"
    strip -o "$USER_MODE.new" "$source/linux" && mv "$USER_MODE.new" "$USER_MODE"
    rm -rf "$source"
}
