#!/bin/sh
# Makes a container of a busybox root in the namespaces that it is started in, and stays as its first process.
#
#	box.sh LEVELS ROOT [WINDOW]
#
# ROOT has bin/busybox, links to it, and the folders proc, sys, dev and tmp. WINDOW is bound over /sys/kernel/security. With
# more than one level, the container makes namespaces below itself, each in the one before. It is ready when ROOT/ready is there.
set -e
levels=$1 root=$2 window=$3
if [ "$root" != / ]; then
	mount --bind "$root" "$root"
	mount --rbind /sys "$root/sys"
	mount --rbind /dev "$root/dev"
	[ -z "$window" ] || mount --bind "$window" "$root/sys/kernel/security"
	mount -t proc proc "$root/proc"
	cd "$root"
	pivot_root . .
	umount -l .
	cd /
fi
[ "$levels" = 1 ] || exec unshare --user --map-root-user --mount --pid --fork sh /scripts/box.sh $((levels - 1)) /
[ "$root" != / ] || mount -t proc proc /proc
: >/ready
until read -r _ </stop; do :; done # a child that ends interrupts the open
