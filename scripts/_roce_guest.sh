#!/bin/bash
# The first program on the laboratory's machine: makes the two RoCE ports, runs the command, says how it ended.
# /run/lab is the folder shared with the machine outside; see roce_lab.sh.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
export ROCE_LAB_OUT=/run/lab/out

folders() {
    mkdir -p /dev/shm /dev/pts
    mount -t tmpfs tmpfs /dev/shm && mount -t devpts devpts /dev/pts
    hostname lab
}

# v0 - s0 [switch0] t0 - t1 [switch1] s1 - v1. One kernel would hand packets between its own addresses over "lo"; rules
# send them over the cables instead: Soft-RoCE serves only the first network namespace, so the ends cannot live in two.
cables() {
    sysctl -qw net.ipv4.conf.{all,default}.rp_filter=0 net.ipv4.conf.{all,default}.accept_local=1 \
        net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2
    ip link set lo up
    ip link add t0 mtu 4200 type veth peer name t1 mtu 4200
    local end other
    for end in 0 1; do
        other=$((1 - end))
        ip link add "v$end" mtu 4200 type veth peer name "s$end" mtu 4200
        ip link add "switch$end" mtu 4200 up type bridge
        ip link set "s$end" master "switch$end" up
        ip link set "t$end" master "switch$end" up
        ip addr add "10.77.0.$((end + 1))/32" dev "v$end"
        ip link set "v$end" up
        ip rule add pref "$((1 + end))" iif "v$end" lookup local
        ip rule add pref "$((10 + end))" from "10.77.0.$((end + 1))" to "10.77.0.$((other + 1))" lookup "$((100 + end))"
        ip rule add pref "$((20 + end))" to "10.77.0.$((other + 1))" oif "v$end" lookup "$((100 + end))"
    done
    routes
    ip rule add pref 100 lookup local
    ip rule del pref 0
}

# The kernel forgets them when a link goes down; roce-fault calls this when it comes up again.
routes() {
    ip route replace 10.77.0.2 dev v0 src 10.77.0.1 table 100
    ip route replace 10.77.0.1 dev v1 src 10.77.0.2 table 101
}

ports() {
    if [ -e /proc/modules ]; then modprobe -a rdma_rxe rdma_ucm veth bridge sch_netem; fi
    cables
    local end
    for end in 0 1; do rdma link add "rxe$end" type rxe netdev "v$end"; done
    for _ in {1..100}; do
        [ "$(cat /sys/class/infiniband/rxe[01]/ports/1/gids/1 | grep -c ffff:0a4d)" = 2 ] && return
        sleep 0.1
    done
    return 1
}

folders
if (set -e && ports) >/dev/console 2>&1; then
    cut -d ' ' -f 1 /proc/uptime >/run/lab/ready
    ulimit -l unlimited
    ulimit -c 0
    # shellcheck disable=SC1091
    (. /run/lab/command) </dev/null >/run/lab/output 2>&1
    echo $? >/run/lab/status
else
    echo "the RoCE ports did not come up" >/dev/console
fi
sync
busybox poweroff -f || poweroff -f
sleep 60
