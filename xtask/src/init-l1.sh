#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The L1 VM's first process: makes the machine's files visible at their own places, to read only, and
# runs one command there. /ctl (shared, to read and write) has what to do and takes the exit status.
#
#   /ctl/command   the command, for /bin/sh
#   /ctl/writable  lines "TAG PATH": shares to mount over PATH, to read and write
#   /ctl/keep      lines PATH: what of the machine's /tmp must stay visible
#   /ctl/stdin     exists: the command reads what comes in by the first port

/bin/busybox --install -s /bin
export PATH=/bin

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

fail() {
    echo "L1: $*"
    poweroff -f
}

for module in 9pnet_virtio 9p kvm_amd; do
    modprobe $module || fail "cannot load $module"
done

# For what is asked for later, such as the parts of a guest's network.
echo /bin/modprobe > /proc/sys/kernel/modprobe
mkdir -p /dev/net
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200

share() {
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2"
}

mkdir -p /host /ctl /keep
share ctl /ctl cache=none || fail "cannot mount the control share"
share host /host ro,cache=loose || fail "cannot mount the machine's files"

# Makes a place like $1 at $2, and shows $1 there.
show() {
    if [ -d "$1" ]; then
        mkdir -p "$2"
    else
        mkdir -p "${2%/*}"
        touch "$2"
    fi
    mount --bind "$1" "$2" || fail "cannot keep $1"
}

while read -r path; do show "/host$path" "/keep$path"; done < /ctl/keep

mount -t tmpfs tmpfs /host/tmp
mount -t tmpfs tmpfs /host/run
mount --bind /dev /host/dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /host/dev/pts
mount -t tmpfs tmpfs /host/dev/shm
mount --bind /proc /host/proc
mount --bind /sys /host/sys
chmod 1777 /host/tmp /host/dev/shm
ln -s /proc/self/fd /dev/fd
ip link set lo up

# QEMU's user-mode network, as it is without options.
if modprobe virtio_net; then
    ip address add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    ip route add default via 10.0.2.2
    echo nameserver 10.0.2.3 > /resolv.conf
    names=/host/etc/resolv.conf
    if [ -L $names ]; then
        # It leads into /run, where nothing is any more.
        names=$(readlink $names)
        case $names in
            /*) names=/host$names ;;
            *) names=/host/etc/$names ;;
        esac
        mkdir -p "${names%/*}"
        cp /resolv.conf "$names"
    elif [ -e $names ]; then
        mount --bind /resolv.conf $names
    fi
fi

while read -r path; do show "/keep$path" "/host$path"; done < /ctl/keep
while read -r tag path; do
    mkdir -p "/host$path"
    share "$tag" "/host$path" cache=none || fail "cannot mount $path"
done < /ctl/writable

mkdir /host/tmp/.l1
mount --bind /ctl /host/tmp/.l1

# Ports appear when the host has answered the driver. The number of their device is not known.
port() {
    tries=0
    until [ -e /dev/vport[0-9]p"$1" ]; do
        tries=$((tries + 1))
        [ $tries -gt 1000 ] && fail "port $1 did not appear"
        usleep 10000
    done
    echo /dev/vport[0-9]p"$1"
}
output=$(port 2)
errors=$(port 3)
input=/dev/null
[ -e /ctl/stdin ] && input=$(port 1)

# The machine's files become the root of the mount namespace: a process that is in a mere chroot may not make
# a user namespace, as passt does.
(cd /host && mount --move . / && exec chroot . /bin/sh /tmp/.l1/command) < "$input" > "$output" 2> "$errors"
echo $? > /ctl/status
poweroff -f
