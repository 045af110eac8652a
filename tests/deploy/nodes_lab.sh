#!/usr/bin/env bash
# Nodes for tests of scripts/deploy.sh: each has a network of its own on a bridge, a host name, processes, /etc, /usr,
# /var, /home, /root, /tmp and /run of its own, and a real sshd. Run it as root, so that all of it ends with it:
#
#     unshare --net --mount --pid --fork --kill-child --mount-proc nodes_lab.sh FOLDER NODES [KEPT ...]
#
# Nodes are n1, n2, ... at 10.77.9.1, ...; who comes is known by FOLDER/key; their sshds' keys are in FOLDER/known_hosts.
# /mnt/shared is one folder for all. KEPT are folders that stay visible although they lie below a hidden one.
set -Eeuo pipefail

NET=10.77.9

laboratory() {
    local folder=$1 nodes=$2 node process
    shift 2
    mount --make-rprivate /
    ip link set lo up
    ip link add nodes type bridge
    ip address add $NET.254/24 dev nodes
    ip link set nodes up
    mkdir -p "$folder/shared" "$folder/ready"
    {
        printf '127.0.0.1 localhost\n'
        for ((node = 1; node <= nodes; node++)); do printf '%s n%d\n' "$NET.$node" "$node"; done
    } >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts
    ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
    for ((node = 1; node <= nodes; node++)); do
        ssh-keygen -q -t ed25519 -N '' -f "$folder/n$node.key"
        printf 'n%d %s\n' "$node" "$(cut -d' ' -f1,2 "$folder/n$node.key.pub")" >>"$folder/known_hosts"
        unshare --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
            "$0" _node "$folder" "$node" "$@" >"$folder/n$node.log" 2>&1 &
        process=$!
        until [ "$(readlink /proc/self/ns/net)" != "$(readlink /proc/$process/ns/net)" ]; do sleep 0.02; done
        ip link add "to-n$node" type veth peer name eth0 netns $process
        ip link set "to-n$node" master nodes up
    done
    wait
}

node() {
    local folder=$1 number=$2 place
    shift 2
    hostname "n$number"
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip link set lo up
    ip address add "$NET.$number/24" dev eth0
    ip link set eth0 up
    # a place for what is this node's, outside all that is hidden
    mount -t tmpfs node /mnt
    mkdir -p /mnt/{lab,kept,shared}
    mount --bind "$folder" /mnt/lab
    mount --bind "$folder/shared" /mnt/shared
    for place; do
        mkdir -p "/mnt/kept$place"
        mount --bind "$place" "/mnt/kept$place"
    done
    umount /etc/hosts
    for place in etc usr var; do # what is installed here stays here
        mkdir -p "/mnt/upper/$place" "/mnt/scratch/$place"
        mount -t overlay node -o "lowerdir=/$place,upperdir=/mnt/upper/$place,workdir=/mnt/scratch/$place" "/$place"
    done
    cat /mnt/lab/hosts >/etc/hosts
    printf 'n%d\n' "$number" >/etc/hostname
    rm -f /etc/ssh/ssh_host_* # this machine's are another's
    for place in /home /tmp /run /var/tmp /dev/shm /root; do mount -t tmpfs -o mode=1777 node "$place"; done
    chmod 755 /home /run
    chmod 711 /root
    for place; do
        mkdir -p "$place"
        mount --bind "/mnt/kept$place" "$place"
    done
    mkdir -p /run/sshd
    install -d -m 700 /root/.ssh
    install -m 600 /mnt/lab/key.pub /root/.ssh/authorized_keys
    install -m 600 "/mnt/lab/n$number.key" /etc/ssh/ssh_host_ed25519_key
    install -m 644 "/mnt/lab/n$number.key.pub" /etc/ssh/ssh_host_ed25519_key.pub
    touch "/mnt/lab/ready/n$number"
    exec /usr/sbin/sshd -D -e -o UsePAM=yes -o PrintMotd=no -o UseDNS=no
}

if [ "$1" = _node ]; then
    shift
    node "$@"
else
    laboratory "$@"
fi
