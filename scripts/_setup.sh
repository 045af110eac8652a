# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv, installs the package with the extras asked for, compiles.
#
#     set_up EXTRA...      for instance: set_up mpi test
#
# Needs Python 3.11 or newer and a C++ compiler. What a bare Debian lacks (python3-venv, g++) comes through apt: as root
# or with a sudo that asks nothing it is installed, else it is unpacked inside .venv, which needs no rights at all.
# PYTHON names another Python, CXX another compiler, VENV another folder. A second run reuses what is there.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
TORCH=torch==2.13.0

# The kernels for GPUs take minutes to compile: without being asked only where there is a GPU.
[ -e /dev/nvidiactl ] || export RWKVMPI_CUDA="${RWKVMPI_CUDA:-0}"

say() { printf '==> %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

set_up() {
    cd "$ROOT" || exit
    make_venv
    find_compiler
    install_packages "$@"
    "$VENV/bin/python" setup.py --quiet build_ext --inplace || die "the operators could not be compiled; see above"
    prepare_mpi
    PATH=$VENV/bin:$PATH
    export PATH
}

# --- Python

make_venv() {
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python) || die "Python 3.11 or newer is needed; install it, or name one in PYTHON"
    say "making $VENV with $("$python" --version)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && can_install; then
        install_debian "$(debian_venv_package "$python")" || true
    fi
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv --clear "$VENV" || die "$VENV could not be made"
    else
        make_venv_without_ensurepip "$python"
    fi
}

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

debian_venv_package() { "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'; }

# Debian keeps pip's wheel in a package of its own. A wheel is a zip archive that Python can run from.
make_venv_without_ensurepip() {
    "$1" -m venv --clear --without-pip "$VENV" ||
        die "$1 cannot make virtual environments; install $(debian_venv_package "$1")"
    local wheel
    wheel=$(first_file /usr/share/python-wheels/pip-*.whl)
    if [ -z "$wheel" ] && unpack_debian python3-pip-whl; then
        wheel=$(first_file "$VENV"/debian/usr/share/python-wheels/pip-*.whl)
    fi
    if [ -n "$wheel" ]; then
        PYTHONPATH=$wheel "$VENV/bin/python" -m pip install --quiet pip || die "pip could not be installed into $VENV"
    elif "$1" -m pip --version >/dev/null 2>&1; then
        "$1" -m pip --python "$VENV/bin/python" install --quiet pip || die "pip could not be installed into $VENV"
    else
        die "neither ensurepip nor pip was found; install $(debian_venv_package "$1")"
    fi
}

# --- C++

find_compiler() {
    if [ -n "${CXX:-}" ]; then
        return
    elif command -v g++ >/dev/null; then
        export CXX=g++
    elif can_install && install_debian g++ && command -v g++ >/dev/null; then
        export CXX=g++
    elif unpack_compiler; then
        say "using gcc with the C++ part unpacked in $VENV/debian"
    else
        die "no C++ compiler; install g++, or name a compiler in CXX"
    fi
}

# gcc without g++ lacks the C++ compiler proper and its library's headers; -B tells gcc where to find them.
unpack_compiler() {
    local version here
    version=$(gcc -dumpversion 2>/dev/null | cut -d. -f1) && [ -n "$version" ] || return 1
    here=$VENV/debian/usr/lib/gcc/$(gcc -dumpmachine)/$version
    [ -x "$here/cc1plus" ] || unpack_debian "g++-$version" "libstdc++-$version-dev" || return 1
    [ -x "$here/cc1plus" ] || return 1
    # the library itself is on every machine; only the link for the linker is not, and the unpacked one points nowhere
    ln -sf "$(gcc -print-file-name=libstdc++.so.6)" "$here/libstdc++.so"
    local headers=$VENV/debian/usr/include
    CXX="gcc -B$here -isystem $headers/c++/$version -isystem $headers/$(gcc -print-multiarch)/c++/$version"
    export CXX="$CXX -L$here -Wl,--no-as-needed -lstdc++"
}

# --- packages of Python

# Every extra is installed once per setup.py; a sum of what decides is kept for each.
install_packages() {
    local extra wanted missing=
    wanted="$(cat setup.py pyproject.toml | sha256sum) $ROOT $TORCH $("$VENV/bin/python" --version)"
    for extra; do
        [ "$(cat "$VENV/.installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=$missing,$extra
    done
    [ -n "$missing" ] || return 0
    say "installing $TORCH and what else is needed, compiling the operators (the first time takes minutes)"
    pip_install --upgrade 'setuptools>=77' wheel
    pip_install "$TORCH"
    pip_install --no-build-isolation --editable ".[${missing#,}]"
    for extra; do printf '%s' "$wanted" >"$VENV/.installed-$extra"; done
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore "$@" ||
        die "pip install $* failed; see above"
}

# --- MPI

# The wheel's mpirun refuses root, and refuses more ranks than cores; both are normal here.
prepare_mpi() {
    unset OPAL_PREFIX PMIX_PREFIX PRTE_PREFIX # a site's MPI module would send it to the wrong library
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
}

# --- Debian's packages

have_apt() { command -v apt-get >/dev/null; }

can_install() { have_apt && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

install_debian() {
    say "installing $* with apt"
    local command=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    as_root "${command[@]}" update >/dev/null || true # an index that is out of reach need not be the one that counts
    as_root "${command[@]}" install --yes --no-install-recommends "$@" >/dev/null
}

# Fetch packages with apt as an ordinary user, its lists and caches kept in .venv, and unpack them there.
unpack_debian() {
    have_apt && command -v dpkg-deb >/dev/null || return 1
    say "unpacking $* into $VENV/debian (no rights to install)"
    local apt=$VENV/debian/apt file
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/debs"
    local options=(-qq -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o Debug::NoLocking=1)
    [ -n "$(find "$apt/lists" -name '*Packages*' -print -quit)" ] || apt-get "${options[@]}" update || return 1
    (cd "$apt/debs" && apt-get "${options[@]}" download "$@") || return 1
    for file in "$apt"/debs/*.deb; do
        dpkg-deb --extract "$file" "$VENV/debian" || return 1
    done
}

first_file() {
    if [ -e "$1" ]; then printf '%s' "$1"; fi
}
