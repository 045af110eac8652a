# shellcheck shell=bash disable=SC2034,SC2153
# Sourced by deploy.sh: the hostfile, ssh to many hosts at a time, what they answered, the table at the end.

ROOT=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
GOOD=() # the hosts that nothing has failed on

refuse() {
    printf 'deploy.sh: %s\n' "$*" >&2
    exit 2
}

sum_of() { sha256sum <"$1" | cut -d' ' -f1; }

read_hostfile() {
    [ -r "$HOSTFILE" ] || refuse "no hostfile $HOSTFILE"
    local line word
    local -A seen=()
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        read -r word _ <<<"$line" || true
        [ -n "${word:-}" ] || continue
        [[ $word =~ ^[A-Za-z0-9][A-Za-z0-9._:-]*$ ]] || refuse "$HOSTFILE: $word is not the name of a host"
        [ -z "${seen[$word]:-}" ] || continue
        seen[$word]=1
        HOSTS+=("$word")
    done <"$HOSTFILE"
    [ ${#HOSTS[@]} -gt 0 ] || refuse "$HOSTFILE names no host"
}

# The folder of this start: what the hosts answer, the project as it is sent, ssh's shared connections.
prepare() {
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/deploy.XXXXXX")
    trap sweep EXIT
    trap 'exit 130' INT TERM HUP
    GOOD=("${HOSTS[@]}")
    NEEDS_SSH=$MPIRUN
    [ ${#HOSTS[@]} -gt 1 ] || NEEDS_SSH=0
    sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$HOSTFILE" >"$WORK/hostfile"
    # shellcheck disable=SC2206 # words of a variable
    SSH+=(${SSH_OPTIONS:-} -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
    SSH+=(-o ControlMaster=auto -o "ControlPath=$WORK/%C" -o ControlPersist=30)
    pack_project
    make_node_text
}

sweep() {
    local socket
    trap '' INT TERM
    # shellcheck disable=SC2046 # one word per process
    kill $(jobs -p) 2>/dev/null || true
    for socket in "$WORK"/*; do
        [ ! -S "$socket" ] || ssh -o ControlPath="$socket" -O exit host 2>/dev/null || true
    done
    rm -rf "$WORK"
}

# The files that git knows or would take, otherwise all but what is made here, with a list of their sums.
pack_project() {
    (cd "$ROOT" && pack_this_folder) || refuse "the project in $ROOT could not be packed"
    PROJECT_SUM=$(sum_of "$WORK/.deploy-sums")
}

pack_this_folder() {
    local ops=() file
    if ! git ls-files -z --cached --others --exclude-standard >"$WORK/files" 2>/dev/null; then
        find . -type f -not -path './.*' -not -path './build/*' -not -path './runs/*' -not -name '*.pyc' \
            -not -name '*.so' -printf '%P\0' >"$WORK/files"
    fi
    [ "$OPERATORS" = build ] || ops=(rwkvmpi/ops/_*.so)
    [ ${#ops[@]} = 0 ] || printf '%s\0' "${ops[@]}" >>"$WORK/files"
    while IFS= read -r -d '' file; do
        [ ! -f "$file" ] || printf '%s\0' "$file"
    done <"$WORK/files" | sort -z -u >"$WORK/present"
    xargs -0 sha256sum -- <"$WORK/present" >"$WORK/.deploy-sums"
    tar --create --file "$WORK/project.tar" --owner=0 --group=0 --numeric-owner --null --files-from "$WORK/present" \
        -C "$WORK" .deploy-sums
}

# --- ssh

quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# What a host's bash is told to run.
make_node_text() {
    local name
    {
        for name in ACCOUNT PREFIX MODE OPERATORS EXTRAS PYTHON PACKAGES OFFLINE DRY NEEDS_SSH; do
            printf '%s=' "$name" && quoted "${!name}" && echo
        done
        cat "$ROOT"/scripts/{_setup,_deploy_node,_deploy_files,_deploy_account}.sh
        echo 'main "$@"'
    } >"$WORK/node.sh"
    NODE_TEXT=$(quoted "$(cat "$WORK/node.sh")")
}

# on HOST ACTION ARGUMENT...: do it there, with this stdin; say what it answers. Code 1 if it failed.
on() {
    local host=$1 words='' word line
    shift
    for word; do words+=" $(quoted "$word")"; done
    while IFS= read -r line; do
        hear "$host" "$line"
    done < <(
        # shellcheck disable=SC2029 # it is meant for the other side as it stands here
        ssh "${SSH[@]}" "$host" "bash -c $NODE_TEXT deploy$words" 2>"$WORK/$host.err" || echo "ended $?"
    )
    [ ! -e "$WORK/$host.bad" ]
}

ask() { on "$@" </dev/null; }

hear() {
    local host=$1 word=${2%% *} rest=${2#* }
    case $word in
        changed | would | warning)
            ! grep -qxF -e "$rest" "$WORK/$host.$word" 2>/dev/null || return 0 # a dry run says the same at every step
            echo "$rest" >>"$WORK/$host.$word"
            [ "$word" != would ] || rest="would $rest"
            [ "$word" != warning ] || rest="warning: $rest"
            printf '%s: %s\n' "$host" "$rest"
            ;;
        same) ;;
        found) printf '%s: %s\n' "$host" "$rest" ;;
        failed)
            sed "s/^/$host| /" "$WORK/$host.err"
            fail "$host" "$rest"
            ;;
        fact) note_fact "$host" "${rest%% *}" "${rest#* }" ;;
        ended)
            [ -e "$WORK/$host.bad" ] || fail "$host" "$(why_ended "$host" "$rest")"
            ;;
        *) printf '%s: %s\n' "$host" "$2" ;;
    esac
}

why_ended() {
    local words
    words=$(grep -v '^ *$' "$WORK/$1.err" | tail -n 3 | tr -d '\r' | paste -sd' ') || true
    if [ "$2" = 255 ]; then
        echo "ssh: ${words:-the connection ended}"
    else
        echo "ended with exit code $2: $words"
    fi
}

# Keys may be several, of the rest the last word counts.
note_fact() {
    case $2 in
        sshd | account) echo "$3" >>"$WORK/$1.fact.$2" ;;
        *) echo "$3" >"$WORK/$1.fact.$2" ;;
    esac
}

fact() { cat "$WORK/$1.fact.$2" 2>/dev/null || true; }

fail() {
    [ -z "${2:-}" ] || { printf '%s: FAILED: %s\n' "$1" "$2" && printf '%s\n' "$2" >>"$WORK/$1.bad"; }
    touch "$WORK/$1.bad"
}

fail_all() {
    local host
    for host in "${GOOD[@]}"; do [ -e "$WORK/$host.bad" ] || fail "$host" "$1"; done
}

refresh() {
    local host left=()
    for host in "${GOOD[@]}"; do [ -e "$WORK/$host.bad" ] || left+=("$host"); done
    GOOD=("${left[@]}")
}

# everywhere FUNCTION: on all good hosts, JOBS at a time; who fails is no longer good.
everywhere() {
    local host running=0
    refresh
    for host in "${GOOD[@]}"; do
        if [ $running -ge "$JOBS" ]; then
            wait -n || true
            running=$((running - 1))
        fi
        { "$1" "$host" || fail "$host"; } &
        running=$((running + 1))
    done
    wait
    refresh
}

# --- the end

table() {
    local host state what bad=0 width=4
    for host in "${HOSTS[@]}"; do [ ${#host} -le "$width" ] || width=${#host}; done
    echo
    printf "%-${width}s  %-10s %s\n" host result what
    for host in "${HOSTS[@]}"; do
        what=$(fact "$host" operators)
        if [ -e "$WORK/$host.bad" ] || [ ! -e "$WORK/$host.examined" ]; then
            state=failed what=$(head -n 1 "$WORK/$host.bad" 2>/dev/null || true)
            what=${what:-see above}
            bad=$((bad + 1))
        elif [ -s "$WORK/$host.would" ]; then
            state='to do' what="$(wc -l <"$WORK/$host.would") steps"
        elif [ -s "$WORK/$host.changed" ]; then
            state=changed what="$(wc -l <"$WORK/$host.changed") changes${what:+; $what}"
        else
            state=unchanged
        fi
        printf "%-${width}s  %-10s %s\n" "$host" "$state" "$what"
    done
    [ $bad = 0 ] || exit 1
}
