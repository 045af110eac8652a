# shellcheck shell=bash disable=SC2034,SC2153
# What scripts/deploy.sh does on a node. deploy.sh sends this text with every ssh, behind that of _setup.sh and before
# _deploy_files.sh and _deploy_account.sh; nothing of it is left there. Settings stand before it: ACCOUNT, PREFIX, MODE,
# OPERATORS, EXTRAS, PYTHON, PACKAGES, OFFLINE, DRY, NEEDS_SSH.
#
# It answers in lines, a word and a sentence: changed, would, same, found, warning, failed, fact.
set -Eeuo pipefail
export LC_ALL=C.UTF-8

MARK='rwkvmpi (scripts/deploy.sh)'

did() { printf 'changed %s\n' "$*"; }
same() { printf 'same %s\n' "$*"; }
found() { printf 'found %s\n' "$*"; }
warn() { printf 'warning %s\n' "$*"; }
say() { did "$*"; } # _setup.sh says what it is about to do, and only when there is something to do
die() { printf 'failed %s\n' "$*" && exit 1; }
# In a dry run: says what would be done, and is true.
only_planned() { [ "$DRY" = 1 ] && printf 'would %s\n' "$*"; }
sum_of() { sha256sum <"$1" | cut -d' ' -f1; }
trap 'printf "failed %s\n" "line $LINENO of $0 $ACTION ended with exit code $?: $BASH_COMMAND"' ERR

ACTION='' PYTHON=${PACKAGES:-$PYTHON}

main() {
    ACTION=$1
    if [ "$ACTION" != check ]; then # the check makes the account, the rest is done as it
        become_account "$@"
        find_folders
        cd "$HOME"
    fi
    "$@"
}

become_account() {
    [ -n "$ACCOUNT" ] && [ "$(id -un)" != "$ACCOUNT" ] || return 0
    local home
    home=$(home_of "$ACCOUNT")
    [ -n "$home" ] || { only_planned "go on as $ACCOUNT, once it is there" && exit 0; } || die "no account $ACCOUNT"
    if [ "$(id -u)" = 0 ]; then
        exec runuser -u "$ACCOUNT" -- env HOME="$home" USER="$ACCOUNT" LOGNAME="$ACCOUNT" SHELL=/bin/bash \
            bash -c "$BASH_EXECUTION_STRING" "$0" "$@"
    fi
    exec sudo -n -H -u "$ACCOUNT" bash -c "$BASH_EXECUTION_STRING" "$0" "$@"
}

# The home of an account; nothing if there is none (getent's code is then 2).
home_of() { { getent passwd "$1" || true; } | cut -d: -f6; }

find_folders() {
    local home=$HOME
    [ -z "$ACCOUNT" ] || home=$(home_of "$ACCOUNT")
    case $PREFIX in
        '') PREFIX=$home/rwkvmpi ;;
        /*) ;;
        *) PREFIX=$home/$PREFIX ;;
    esac
    PROJECT=$PREFIX/project ROOT=$PREFIX/project VENV=$PREFIX/venv OURS=$PREFIX/.deployed
}

# --- the machine, as whoever logs in

check() {
    printf 'fact arch %s\n' "$(uname -m)"
    [ -z "$ACCOUNT" ] || make_account
    install_system
    [ -z "$ACCOUNT" ] || [ -n "$(home_of "$ACCOUNT")" ] || return 0 # a dry run
    find_folders
    [ ! -e "$PREFIX" ] || [ -e "$OURS/mark" ] || [ -z "$(ls -A "$PREFIX")" ] ||
        die "$PREFIX is there already and was not made by deploy.sh; name another --prefix, or move it away"
    make_prefix
}

make_account() {
    if getent passwd "$ACCOUNT" >/dev/null; then return; fi
    [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null ||
        die "there is no account $ACCOUNT, and $(id -un) is neither root nor has a sudo that asks nothing; have it made"
    only_planned "make the account $ACCOUNT" && return
    # a * is no password, and unlike useradd's ! does not lock the account for sshd
    as_root useradd --create-home --shell /bin/bash --password '*' "$ACCOUNT"
    did "made the account $ACCOUNT"
}

install_system() {
    local missing=() python name
    [ -z "$PYTHON" ] || "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$PYTHON is not there, or not Python 3.11 or newer; name another, or none"
    if ! python=$(find_python); then
        for name in python3.13 python3.12 python3.11; do
            ! apt-cache show "$name" >/dev/null 2>&1 || break
        done
        missing=("$name" "$name-venv")
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null && [ -z "$PACKAGES" ]; then
        missing=("$(debian_venv_package "$python")")
    fi
    [ "$OPERATORS" = copy ] || command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
    [ "$OPERATORS" = build ] || has_openmp || missing+=(libgomp1)
    [ "$NEEDS_SSH" = 0 ] || command -v ssh >/dev/null || missing+=(openssh-client)
    [ ${#missing[@]} -gt 0 ] || return 0
    if can_install; then
        only_planned "install ${missing[*]} with apt" && return
        install_debian "${missing[@]}" || die "apt-get install ${missing[*]} failed"
    elif [ -z "$python" ]; then
        die "no Python 3.11 or newer, and no right to install one; have an administrator install ${missing[*]}, or name one: --python"
    else # _setup.sh unpacks python3-venv and g++ in the venv
        warn "not installed, and no right to do so: ${missing[*]}"
    fi
}

has_openmp() { [[ $(/sbin/ldconfig -p 2>/dev/null) == *libgomp.so.1* ]]; }

make_prefix() {
    [ ! -d "$PREFIX" ] || return 0
    only_planned "make $PREFIX" && return
    local account=${ACCOUNT:-$(id -un)}
    if [ "$account" = "$(id -un)" ]; then
        mkdir -p "$PREFIX" || die "$PREFIX cannot be made by $account; name another --prefix"
    else
        as_root install -d -o "$account" -g "$(id -gn "$account")" "$PREFIX" || die "$PREFIX cannot be made"
    fi
    did "made $PREFIX"
}

# The marks of what is ours; a second deploy waits for its turn. Descriptor 9 holds the lock until the end.
enter() {
    mkdir -p "$OURS" || die "$(id -un) may not write in $PREFIX; name another --prefix"
    touch "$OURS/mark" "$OURS/files"
    exec 9>>"$OURS/mark"
    flock -w 900 9 || die "another deploy.sh has been at work in $PREFIX for 15 minutes"
}

# --- a file system that all nodes see

write_token() {
    enter
    rm -f "$PREFIX"/.token-* # of one that was interrupted
    printf '%s' "$1" >"$PREFIX/.token-$1"
}

remove_token() { rm -f "$PREFIX/.token-$1"; }

# Network file systems show a new file after some seconds only.
see_token() {
    local try
    for try in {1..20}; do
        [ "$(cat "$PREFIX/.token-$1" 2>/dev/null)" != "$1" ] || return 0
        ls "$PREFIX" >/dev/null 2>&1 || true
        sleep 0.5
    done
    die "does not see $PREFIX/.token-$1 that $2 wrote, after ${try} tries: $PREFIX is not on a file system that both see"
}

# --- the installation

set_up_package() {
    [ -e "$VENV/.complete" ] || ! only_planned "make $VENV and install the package with ${EXTRAS:-no extras}" || return 0
    [ "$DRY" = 0 ] || return 0
    enter
    cd "$PROJECT"
    [ "$OPERATORS" = build ] || export RWKVMPI_CUDA=0
    [ -z "$PACKAGES" ] || use_packages
    make_venv
    [ -z "$PACKAGES" ] || use_packages # if it had to be made anew
    [ "$OPERATORS" = copy ] || find_compiler
    [ "$OFFLINE" = 0 ] || export PIP_NO_INDEX=1
    [ ! -d "$PREFIX/wheels" ] || export PIP_FIND_LINKS=$PREFIX/wheels
    install_package
    [ "$OPERATORS" = copy ] || build_operators
    touch "$VENV/.complete"
    write_environment
}

# What the package needs, then the package itself, where it lies: pip's editable install would compile the operators,
# wherever they come from.
install_package() {
    local wanted needs=()
    wanted="$(cat setup.py pyproject.toml | sha256sum) $ROOT $TORCH $("$VENV/bin/python" --version) $EXTRAS"
    [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ] || return 0
    say "installing $TORCH and what else is needed"
    pip_install --upgrade 'setuptools>=77'
    "$VENV/bin/python" setup.py --quiet egg_info
    mapfile -t needs < <(awk -v extras=" $EXTRAS " '
        /^\[/ { left_out = !index(extras, " " substr($0, 2, length($0) - 2) " "); next }
        NF && !left_out' rwkvmpi.egg-info/requires.txt)
    pip_install "$TORCH" "${needs[@]}"
    "$VENV/bin/python" -c 'import sys, sysconfig
from pathlib import Path
Path(sysconfig.get_path("purelib"), "rwkvmpi_project.pth").write_text(sys.argv[1] + "\n")
program = Path(sysconfig.get_path("scripts"), "rwkvmpi")
program.write_text(f"#!{sys.executable}\nimport sys\n\nfrom rwkvmpi.cli import main\n\nsys.exit(main())\n")
program.chmod(0o755)' "$PROJECT"
    printf '%s' "$wanted" >"$VENV/.installed"
}

# The packages of another Python on this node are found too, pip among them, and not installed again.
use_packages() {
    local folders file
    if [ ! -x "$VENV/bin/python" ]; then
        say "making $VENV with $("$PACKAGES" --version)"
        "$PACKAGES" -m venv --without-pip "$VENV" || die "$PACKAGES cannot make virtual environments"
    fi
    file=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/of_the_site.pth")')
    folders=$("$PACKAGES" -c 'import site, sysconfig
print(*dict.fromkeys([*map(sysconfig.get_path, ("purelib", "platlib")), *site.getsitepackages()]), sep="\n")')
    [ "$("$PACKAGES" --version)" = "$("$VENV/bin/python" --version)" ] ||
        die "$VENV has another version of Python than $PACKAGES; remove $VENV, then it is made anew"
    ! "$PACKAGES" -c 'import torch' 2>/dev/null || TORCH='torch>=2.6' # the site's own
    [ "$(cat "$file" 2>/dev/null)" != "$folders" ] || return 0
    printf '%s\n' "$folders" >"$file"
    did "uses the packages of $PACKAGES"
}

build_operators() {
    local before
    before=$(stat -c '%n %Y' rwkvmpi/ops/*.so 2>/dev/null || true)
    "$VENV/bin/python" setup.py --quiet build_ext --inplace >"$OURS/build.log" 2>&1 ||
        die "the operators could not be compiled: $(tail -n 3 "$OURS/build.log" | tr '\n' ' ')"
    [ "$before" = "$(stat -c '%n %Y' rwkvmpi/ops/*.so)" ] || did "compiled the operators ($(uname -m))"
}

# What a login finds. Open MPI of another Python's packages needs its programs and its library named.
write_environment() {
    local text library path="$VENV/bin"
    [ -x "$VENV/bin/mpirun" ] || [ -z "$PACKAGES" ] || path="$path:$(dirname "$PACKAGES")"
    text="# made by deploy.sh; read at login
case \":\$PATH:\" in
    *\":$VENV/bin:\"*) ;;
    *) export VIRTUAL_ENV='$VENV' PATH=\"$path:\$PATH\" ;;
esac"
    library=$(first_file "$VENV"/lib/libmpi.so.*)
    if [ -z "$library" ] && [ -n "$PACKAGES" ]; then
        library=$(first_file "$(readlink -f "$(dirname "$PACKAGES")/..")"/lib/libmpi.so.*)
        [ -z "$library" ] || text+=$'\n'"export MPI4PY_LIBMPI=\"\${MPI4PY_LIBMPI:-$library}\""
    fi
    [ "$(cat "$PREFIX/env.sh" 2>/dev/null)" != "$text" ] || return 0
    printf '%s\n' "$text" >"$PREFIX/.env.sh" && mv "$PREFIX/.env.sh" "$PREFIX/env.sh"
    did "wrote $PREFIX/env.sh"
}
