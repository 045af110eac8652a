# shellcheck shell=bash disable=SC2153
# A part of what deploy.sh does on a node (see _deploy_node.sh): the account's files, ssh between nodes, the doctor,
# mpirun.

# --- the account

# Both kinds of shells must find the installation: a login reads the profile, mpirun's ssh only ~/.bashrc. Debian's
# returns early when no person is there, hence the first lines of it.
login() {
    local profile=.profile name block
    for name in .bash_profile .bash_login; do
        [ ! -e "$HOME/$name" ] || { profile=$name && break; }
    done
    block="[ ! -r '$PREFIX/env.sh' ] || . '$PREFIX/env.sh'"
    put_block "$HOME/.bashrc" first "$block" 644
    put_block "$HOME/$profile" last "$block" 644
    case $(getent passwd "$(id -un)" | cut -d: -f7) in
        */bash | */sh | */dash) ;;
        *) warn "$(id -un) logs in with another shell than bash; source $PREFIX/env.sh in its start file" ;;
    esac
}

# Put a marked block at the begin or end of a file, or change the one that is there; nothing else in it is touched.
put_block() {
    local file=$1 place=$2 block=$3 mode=$4 fresh old begin="# >>> $MARK >>>" end="# <<< $MARK <<<"
    old=$(cat "$file" 2>/dev/null || true)
    fresh=$begin$'\n'$block$'\n'$end
    if [[ $'\n'$old$'\n' == *$'\n'"$fresh"$'\n'* ]]; then return; fi
    only_planned "put a block into $file" && return
    [ ! -L "$file" ] || file=$(readlink -f "$file")
    [ ! -e "$file" ] || cp -p "$file" "$file.$$"
    {
        [ "$place" != first ] || printf '%s\n' "$fresh"
        [ -z "$old" ] || printf '%s\n' "$old" | awk -v begin="$begin" -v end="$end" '
            $0 == begin { inside = 1 } !inside { print } $0 == end { inside = 0 }'
        [ "$place" != last ] || printf '%s\n' "$fresh"
    } >"$file.$$"
    [ -e "$file" ] || chmod "$mode" "$file.$$"
    mv "$file.$$" "$file"
    did "put a block into $file"
}

hostfile() {
    [ -d "$OURS" ] || return 0
    local text
    text=$(cat)
    [ "$(cat "$PREFIX/hostfile" 2>/dev/null)" != "$text" ] || return 0
    only_planned "write $PREFIX/hostfile" && return
    printf '%s\n' "$text" >"$PREFIX/.hostfile.$(uname -n)" && mv "$PREFIX/.hostfile.$(uname -n)" "$PREFIX/hostfile"
    did "wrote $PREFIX/hostfile"
}

# --- ssh between nodes

# The account's public key, made if it has none, and the keys of this machine's sshd: what the others must know.
own_keys() {
    local file keys=()
    for file in "$HOME"/.ssh/id_*.pub; do [ ! -e "$file" ] || keys+=("$file"); done
    if [ ${#keys[@]} = 0 ]; then
        only_planned "make ~/.ssh/id_ed25519" && return
        install -d -m 700 "$HOME/.ssh"
        ssh-keygen -q -t ed25519 -N '' -C "$(id -un)@$1 (deploy.sh)" -f "$HOME/.ssh/id_ed25519"
        keys=("$HOME/.ssh/id_ed25519.pub")
        did "made ~/.ssh/id_ed25519"
    fi
    for file in "${keys[@]}"; do printf 'fact account %s\n' "$(head -n 1 "$file")"; done
    for file in /etc/ssh/ssh_host_*_key.pub; do
        [ ! -r "$file" ] || printf 'fact sshd %s %s\n' "$1" "$(cut -d' ' -f1,2 "$file")"
    done
}

# On stdin: the lines for known_hosts, an empty line, those for authorized_keys. What an earlier deploy.sh wrote of
# other nodes stays: they may be down just now, or stand in another hostfile.
trust() {
    local known='' accounts='' line into=known
    while IFS= read -r line; do
        if [ -z "$line" ]; then
            into=accounts
        elif [ $into = known ]; then
            known+=${known:+$'\n'}$line
        else
            accounts+=${accounts:+$'\n'}$line
        fi
    done
    [ "$DRY" = 1 ] || install -d -m 700 "$HOME/.ssh"
    put_block "$HOME/.ssh/known_hosts" last "$(with_others "$HOME/.ssh/known_hosts" 1 "$known")" 600
    put_block "$HOME/.ssh/authorized_keys" last "$(with_others "$HOME/.ssh/authorized_keys" 3 "$accounts")" 600
}

# The lines of the block in a file whose field (a host, a key's comment) is in none of the new lines, and the new ones.
with_others() {
    awk -v field="$2" -v begin="# >>> $MARK >>>" -v end="# <<< $MARK <<<" '
        FILENAME == "-" { fresh[$field] = 1; next }
        $0 == end { inside = 0 }
        inside && !($field in fresh)
        $0 == begin { inside = 1 }' - "$([ -e "$1" ] && echo "$1" || echo /dev/null)" <<<"$3"
    printf '%s\n' "$3"
}

# Is every one of these reached without a question?
reach() {
    local host folder bad=()
    folder=$(mktemp -d)
    for host; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null >/dev/null 2>"$folder/$host" || touch "$folder/$host.bad" &
    done
    wait
    for host; do
        [ ! -e "$folder/$host.bad" ] || bad+=("$host ($(tail -n 1 "$folder/$host" | tr -d '\r'))")
    done
    rm -rf "$folder"
    [ ${#bad[@]} = 0 ] || die "mpirun needs ssh without questions, but $(id -un) does not reach ${bad[*]}: --ssh-keys arranges it (or ssh-copy-id; or --no-mpirun where Slurm starts the ranks)"
}

# --- does it work

enter_environment() {
    # shellcheck source=/dev/null
    . "$PREFIX/env.sh"
    unset OPAL_PREFIX PMIX_PREFIX PRTE_PREFIX
    [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
}

# Findings that are not in order, one line each, and the operators that this processor gets.
doctor() {
    [ "$DRY" = 0 ] || return 0
    enter_environment
    local code=0 model=()
    [ -z "$1" ] || model=(--model "$(model_path "$1")" --tokenizer "$(model_path "$2")")
    rwkvmpi doctor --json --folder "$PREFIX" "${model[@]}" >"$OURS/doctor-$3.json" 2>"$OURS/doctor-$3.err" || code=$?
    "$VENV/bin/python" - "$OURS/doctor-$3.json" <<'PYTHON' || die "rwkvmpi doctor ended with exit code $code: $(tail -n 1 "$OURS/doctor-$3.err")"
import json
import sys

for finding in json.load(open(sys.argv[1])):
    name, status, value, remedy = (finding[key] for key in ("name", "status", "value", "remedy"))
    if name == "operators":
        print("fact operators", value)
    if status != "ok":
        word = "failed" if status == "fail" else "warning"
        print(word, f"doctor: {name}: {value}" + (f" -> {remedy}" if remedy else ""))
PYTHON
    [ $code = 0 ] || exit 1
    same "rwkvmpi doctor finds nothing wrong"
}

# Files that were sent lie below the installation; words (bundled, auto, bytes) stay what they are.
model_path() { case $1 in models/*) printf '%s/%s' "$PREFIX" "$1" ;; *) printf '%s' "$1" ;; esac }

# One rank on each of these. With a file system that all see they read a text together, and the result must be that of
# one rank alone.
across() {
    [ "$DRY" = 0 ] || return 0
    enter_environment
    local hosts=("${@/%/:1}") log=$OURS/mpirun.log folder=$PREFIX/.trial
    local start=(timeout 300 mpirun -n $# --host "$(IFS=, && echo "${hosts[*]}")" --map-by ppr:1:node)
    command -v mpirun >/dev/null || die "no mpirun: install with --extra mpi, or load the site's MPI at login"
    if [ "$MODE" != shared ]; then
        "${start[@]}" rwkvmpi doctor --folder "$PREFIX" </dev/null >"$log" 2>&1 || not_across $? "$log" $#
        found "mpirun rwkvmpi doctor across $# nodes finds nothing wrong"
        return
    fi
    rm -rf "$folder" && mkdir "$folder"
    head -c 20000 "$PROJECT/README.md" >"$folder/text.txt"
    rwkvmpi score bundled "$folder/text.txt" -o "$folder/one" </dev/null >"$log" 2>&1 || not_across $? "$log" 1
    "${start[@]}" rwkvmpi score bundled "$folder/text.txt" -o "$folder/all" --ring $# </dev/null >"$log" 2>&1 ||
        not_across $? "$log" $#
    [ "$(digest_of "$folder/all")" = "$(digest_of "$folder/one")" ] ||
        die "mpirun across $# nodes gave another result than one rank; both are kept in $folder"
    rm -rf "$folder"
    found "mpirun across $# nodes gives the result of one rank"
}

digest_of() {
    "$VENV/bin/python" -c 'import sys
from rwkvmpi.store.digest import content_digest
print(content_digest(sys.argv[1]))' "$1/results.h5"
}

not_across() {
    tail -n 20 "$2" >&2
    die "mpirun across $3 nodes ended with exit code $1; its words are above, and in $2"
}
