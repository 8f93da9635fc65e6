#!/bin/busybox sh
# shellcheck shell=dash
# First program of the guest: finds the root disk and hands over to guest.sh on it.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
for module in $($bb cat /modules/order); do
	$bb insmod "/modules/$module" || echo "insmod $module failed"
done
until [ -b /dev/vda ]; do $bb usleep 20000; done
$bb mount -t ext4 /dev/vda /newroot
$bb cp /guest.sh /newroot/guest.sh
for dir in proc sys dev; do $bb mount --move "/$dir" "/newroot/$dir"; done
exec $bb switch_root /newroot /guest.sh
