#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The guest's first process. The kernel command line says what to do:
#
#   viridian.drivers=rust|c|none  drivers to load (default: none)
#   viridian.vmbus=K=V,K=V        parameters of vmbus_drv
#   viridian.storvsc=K=V,K=V      parameters of storvsc or hv_storvsc
#   viridian.netvsc=K=V,K=V       parameters of netvsc or hv_netvsc
#   viridian.dhcp                 configure the first network adapter by DHCP, before switching
#   viridian.root=DEVICE          switch to the system on this disk (/dev/NAME or LABEL=NAME);
#                                 without it stay here, with the agent on the second serial port
#   viridian.shell                a shell on the console too, when staying here
#   viridian.size=ROWSxCOLUMNS    size of the user's terminal

/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=linux

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
ip link set lo up 2> /dev/null

drivers=none root= shell= dhcp= vmbus= storvsc= netvsc=
for word in $(cat /proc/cmdline); do
    case $word in
        viridian.drivers=*) drivers=${word#*=} ;;
        viridian.vmbus=*) vmbus=$(echo "${word#*=}" | tr , ' ') ;;
        viridian.storvsc=*) storvsc=$(echo "${word#*=}" | tr , ' ') ;;
        viridian.netvsc=*) netvsc=$(echo "${word#*=}" | tr , ' ') ;;
        viridian.dhcp) dhcp=1 ;;
        viridian.root=*) root=${word#*=} ;;
        viridian.shell) shell=1 ;;
    esac
done

fail() {
    echo "initramfs: $*"
    # With `panic=` on the command line this ends or restarts the machine, as a user expects.
    exit 1
}

modprobe sd_mod
case $drivers in
    rust)
        modprobe vmbus_drv $vmbus || fail "cannot load vmbus_drv"
        modprobe storvsc $storvsc || fail "cannot load storvsc"
        ;;
    c)
        modprobe hv_storvsc $storvsc || fail "cannot load hv_storvsc"
        ;;
    none) ;;
    *) fail "viridian.drivers=$drivers is neither rust nor c nor none" ;;
esac

# Where there is a network adapter: its driver. The system can do without.
network() {
    grep -q f8615163-df3e-46c5-913f-f2d2f965ed0e /sys/bus/vmbus/devices/*/class_id 2> /dev/null || return
    case $drivers in
        rust) modprobe netvsc $netvsc || echo "initramfs: cannot load netvsc" ;;
        c) modprobe hv_netvsc $netvsc || echo "initramfs: cannot load hv_netvsc" ;;
    esac
}

# Asks for an address, while other things go on. The system need not have a service for that, and has its
# network when it begins. Addresses of IPv6 come by themselves.
ask_for_address() {
    adapter=$(ls -d /sys/bus/vmbus/devices/*/net/* 2> /dev/null | head -n 1)
    [ -n "$adapter" ] || return
    cat > /bin/dhcp << 'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
for address in $router; do
    ip route add default via "$address" dev "$interface" && break
done
for address in $dns; do
    echo "nameserver $address"
done > /run/resolv.conf
END
    chmod +x /bin/dhcp
    ip link set "${adapter##*/}" up
    udhcpc -i "${adapter##*/}" -s /bin/dhcp -f -n -q -t 5 -T 1 > /dev/null 2>&1 &
    asking=$!
}

# Waits for the answer. $1: where the system has its names.
take_address() {
    [ -n "$asking" ] || return
    wait "$asking" || echo "initramfs: nobody gives an address"
    [ -s /run/resolv.conf ] || return
    # The one that is there is of the machine that the disk was made on.
    mkdir -p "$1"
    rm -f "$1/resolv.conf"
    cp /run/resolv.conf "$1"
}

asking=
network
[ -n "$dhcp" ] && ask_for_address

if [ -n "$root" ]; then
    modprobe ext4
    tries=0
    while :; do
        case $root in
            LABEL=*) device=$(findfs "$root" 2> /dev/null) ;;
            *) device=$root ;;
        esac
        [ -b "$device" ] && break
        tries=$((tries + 1))
        [ $tries -gt 600 ] && fail "the root disk $root did not appear"
        usleep 50000
    done
    mount -t ext4 -o rw,noatime "$device" /mnt || fail "cannot mount $device"
    # What the system on the disk does not have: the agent, and the modules of this build.
    mkdir -p /run/viridian
    cp /bin/guest-agent /run/viridian/
    cp -r "/lib/modules/$(uname -r)/updates" /run/viridian/modules
    take_address /mnt/etc
    umount /sys/kernel/debug /dev/pts /dev/shm /tmp
    for directory in dev proc sys run; do
        mount --move /$directory /mnt/$directory
    done
    exec switch_root /mnt /sbin/init
fi

modprobe ext4
take_address /etc
if [ -n "$shell" ]; then
    guest-agent /dev/ttyS1 &
    setsid cttyhack sh
else
    # `wait` also takes the processes that commands leave behind.
    guest-agent /dev/ttyS1 &
    wait $!
fi
poweroff -f
