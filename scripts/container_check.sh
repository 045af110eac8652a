#!/usr/bin/env bash
# Builds the image of jobs/container from this clone, which ends with the definition's own test, to see that it is true.
#
#     scripts/container_check.sh [--build-arg NAME=VALUE ...]          leaves build/container/rwkvmpi.sif
#
# With Apptainer on this machine that is all. Without it, root on Debian gets the Apptainer of Debian unstable in a
# root of its own, and Debian 12 from the same mirror (MIRROR, else this machine's) instead of from Docker: 400 MB in build/container, which
# later runs use again. The build itself is then an ordinary user's. pip's settings and the certificates of this machine
# hold in it, as behind a company's proxy.
#
# Exit code: that of the build; 126: it cannot be had here, and why.
set -Eeuo pipefail

ROOT=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
PLACE=$ROOT/build/container
# shellcheck disable=SC2016 # apt fills it in
MIRROR=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -v security | head -n 1 || true)}
PROGRAMS=apptainer,ca-certificates,fakeroot,mount,squashfs-tools,uidmap
USER_INSIDE=builder
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

say() { printf 'container_check: %s\n' "$*" >&2; }
cannot() { say "cannot be had here: $*" && exit 126; }

# A Debian in a folder; whole or not there.
debian() {
    local release=$1 folder=$2 include=$3
    [ ! -d "$folder" ] || return 0
    say "unpacking Debian $release"
    rm -rf "$folder.new"
    debootstrap --variant=minbase --include="$include" "$release" "$folder.new" "$MIRROR" \
        >"$PLACE/debootstrap.log" 2>&1 ||
        cannot "debootstrap $release from $MIRROR failed: $(tail -n 1 "$PLACE/debootstrap.log")"
    rm -rf "$folder.new"/var/cache/apt/archives/*.deb "$folder.new"/dev/*
    mv "$folder.new" "$folder"
}

# Run a command in the unstable Debian, with this project, the machine's devices and network, and nothing else of it.
inside() {
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -eu -c '
        there=$1 project=$2 place=$3 && shift 3
        mount --bind "$there" "$there"
        mount -t proc proc "$there/proc"
        for folder in sys dev; do mount --rbind "/$folder" "$there/$folder"; done
        for folder in "$project" "$place" "${@:2:$1}"; do
            [ ! -d "$folder" ] || { mkdir -p "$there$folder" && mount --bind "$folder" "$there$folder"; }
        done
        shift $(($1 + 1))
        for file in hosts resolv.conf; do cat "/etc/$file" >"$there/etc/$file"; done
        cd "$there" && mkdir -p .old && pivot_root . .old && umount -l /.old
        cd "$project" && exec "$@"
    ' inside "$PLACE/unstable" "$ROOT" "$PLACE" "$@"
}

# What pip is told on this machine, for /etc/pip.conf of the build; the folders that it names are left in FOLDERS.
pip_settings() {
    local key value word
    FOLDERS=()
    printf '[global]\ncert = /mnt/certificates.crt\nretries = 1\n'
    while IFS='=' read -r key value; do
        case $key in global.index-url | global.extra-index-url | global.find-links) ;; *) continue ;; esac
        value=$(tr -d \'\" <<<"$value" | sed 's/\\n/ /g')
        printf '%s = %s\n' "${key#global.}" "$value"
        for word in $value; do
            word=${word#file://}
            [ -d "$word" ] || continue
            word=$(cut -d/ -f-3 <<<"$word") # an index may point to files beside it
            [[ " ${FOLDERS[*]} " == *" $word "* ]] || FOLDERS+=("$word")
        done
    done < <(python3 -m pip config list 2>/dev/null)
}

main() {
    mkdir -p "$PLACE"
    if command -v apptainer >/dev/null; then
        cd "$ROOT" && exec apptainer build --force "$@" "$PLACE/rwkvmpi.sif" jobs/container/rwkvmpi.def
    fi
    [ "$(id -u)" = 0 ] || cannot "there is no apptainer, and only root may unpack one"
    command -v debootstrap >/dev/null || cannot "there is neither apptainer nor debootstrap"
    debian bookworm "$PLACE/debian" ca-certificates
    debian sid "$PLACE/unstable" "$PROGRAMS"
    local folder binds
    pip_settings >"$PLACE/pip.conf"
    cp "$CERTIFICATES" "$PLACE/certificates.crt"
    binds=$PLACE/pip.conf:/etc/pip.conf,$PLACE/certificates.crt:/mnt/certificates.crt
    touch "$PLACE/debian/etc/pip.conf" "$PLACE/debian/mnt/certificates.crt"
    for folder in "${FOLDERS[@]}"; do mkdir -p "$PLACE/debian$folder" && binds+=,$folder; done
    chroot "$PLACE/unstable" id -u $USER_INSIDE >/dev/null 2>&1 ||
        chroot "$PLACE/unstable" useradd --create-home $USER_INSIDE
    rm -f "$PLACE/rwkvmpi.sif" && install -d -m 777 "$PLACE/scratch"
    inside 0 apptainer --silent build --force "$PLACE/scratch/debian.sif" "$PLACE/debian"
    inside ${#FOLDERS[@]} "${FOLDERS[@]}" setpriv --reuid $USER_INSIDE --regid $USER_INSIDE --init-groups \
        env -i PATH="$PATH" HOME=/home/$USER_INSIDE APPTAINER_TMPDIR="$PLACE/scratch" \
        apptainer build --force --bind "$binds" \
        --build-arg bootstrap=localimage --build-arg base="$PLACE/scratch/debian.sif" "$@" \
        "$PLACE/scratch/rwkvmpi.sif" jobs/container/rwkvmpi.def
    chown 0:0 "$PLACE/scratch/rwkvmpi.sif"
    mv "$PLACE/scratch/rwkvmpi.sif" "$PLACE/rwkvmpi.sif"
    rm -rf "$PLACE/scratch"
}

main "$@"
