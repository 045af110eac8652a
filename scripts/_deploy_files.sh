# shellcheck shell=bash disable=SC2153
# A part of what deploy.sh does on a node (see _deploy_node.sh): the project and single files arrive, or are there.

# Is the project there, as the list with this sum has it?
project_state() {
    if [ "$(sum_of "$OURS/project" 2>/dev/null)" = "$1" ] &&
        (cd "$PROJECT" && sha256sum --quiet --status -c "$OURS/project"); then
        same "project (sha256 of its list ${1:0:12})"
    elif ! only_planned "copy the project"; then
        printf 'fact project wanted\n'
    fi
}

# The project as a tar archive on stdin, its list of sums inside. What changed on the node since is never overwritten.
receive_project() {
    enter
    local fresh=$OURS/incoming moved=0 gone=0 path sum
    rm -rf "$fresh"
    mkdir -p "$fresh" "$PROJECT"
    tar -xmf - -C "$fresh"
    mv "$fresh/.deploy-sums" "$OURS/project.fresh"
    if [ "$(sum_of "$OURS/project.fresh")" != "$1" ] || ! (cd "$fresh" && sha256sum --quiet -c "$OURS/project.fresh"); then
        die "the project arrived damaged; try again"
    fi
    local -A known=() wanted=() here=()
    while read -r sum path; do known[$sum/$path]=1; done < <(cat "$OURS"/project "$OURS"/project.next 2>/dev/null)
    while read -r sum path; do wanted[$path]=$sum; done <"$OURS/project.fresh"
    while read -r sum path; do here[$path]=$sum; done < <(
        cd "$PROJECT" && cat "$OURS"/project* | cut -c67- | sort -u | while IFS= read -r path; do
            [ ! -f "$path" ] || printf '%s\0' "$path"
        done | xargs -0r sha256sum
    )
    for path in "${!here[@]}"; do
        case $path in rwkvmpi/ops/*.so) continue ;; esac # compiled here, or copied
        [ "${here[$path]}" = "${wanted[$path]:-}" ] || [ -n "${known[${here[$path]}/$path]:-}" ] ||
            die "$PROJECT/$path was changed on this node; move it away, then deploy.sh puts its own there"
    done
    cat "$OURS/project.fresh" >>"$OURS/project.next" # what may lie there if this is interrupted
    for path in "${!wanted[@]}"; do
        [ "${here[$path]:-}" != "${wanted[$path]}" ] || continue
        mkdir -p "$PROJECT/$(dirname "$path")"
        mv "$fresh/$path" "$PROJECT/$path"
        moved=$((moved + 1))
    done
    for path in "${!here[@]}"; do
        [ -z "${wanted[$path]:-}" ] || continue
        rm "$PROJECT/$path"
        gone=$((gone + 1))
    done
    # compiled elsewhere: newer than the sources, so that nothing is compiled again
    [ "$OPERATORS" = build ] || touch "$PROJECT"/rwkvmpi/ops/*.so
    mv "$OURS/project.fresh" "$OURS/project"
    rm -rf "$fresh" "$OURS/project.next"
    did "copied the project: $moved files new or changed, $gone removed (sha256 of its list ${1:0:12})"
}

# Is this file there with this sum? Else how much of it has come already.
file_state() {
    local target=$PREFIX/$1 sum=$2 size=$3 part here free
    part=$(part_of "$1" "$sum")
    if [ -e "$target" ]; then
        here=$(sum_of "$target")
        if [ "$here" = "$sum" ]; then
            same "$1 (sha256 ${sum:0:12})"
            return
        fi
        grep -qxF "$here  $1" "$OURS/files" 2>/dev/null ||
            die "$target is another file (sha256 ${here:0:12}) that deploy.sh did not put there; move it away"
    fi
    only_planned "copy $1 ($size bytes)" && return
    here=$(stat -c %s "$part" 2>/dev/null || echo 0)
    free=$(df --output=avail -B1 "$PREFIX" | tail -n 1)
    [ "$free" -gt $((size - here)) ] || die "$PREFIX has $free bytes free; $1 needs $((size - here)) more"
    printf 'fact have %s\n' "$here"
}

# The rest of a file on stdin. What an interruption left goes on at the next try.
receive_file() {
    enter
    local target=$PREFIX/$1 sum=$2 part
    part=$(part_of "$1" "$sum")
    mkdir -p "$(dirname "$target")"
    cat >>"$part"
    if [ "$(sum_of "$part")" != "$sum" ]; then
        [ "$(stat -c %s "$part")" -lt "$3" ] && die "$1 came only in part; run deploy.sh again, it goes on there"
        rm "$part"
        die "$1 arrived damaged; run deploy.sh again"
    fi
    mv "$part" "$target"
    printf '%s  %s\n' "$sum" "$1" >>"$OURS/files"
    did "copied $1 (sha256 ${sum:0:12})"
}

part_of() { printf '%s/%s.%s.part' "$OURS" "$(basename "$1")" "${2:0:16}"; }
