#!/bin/bash
# Process 1 of the guest: mounts what a Debian system has, runs the command that the host left in the share, hands back
# its output and exit status, and powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8
cd /root || exit 1

share() { # TAG DIRECTORY OPTIONS
	mkdir -p "$2"
	mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2"
}

mount --make-rshared /
mount -t securityfs securityfs /sys/kernel/security
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for dir in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777 tmpfs "$dir"; done
chmod 755 /run
echo "+cpu +memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
ip link set lo up
hostname guest

share host /host cache=none
share modules /lib/modules ro,cache=loose
share payload /payload ro,cache=loose
modprobe -qa overlay fuse loop tpm_vtpm_proxy

find /payload -maxdepth 1 -type f -perm -u+x -exec cp -t /usr/local/bin {} +

if ! touch /host/.vm/up; then
	echo "the host's share is not there: cannot run the command"
	echo o >/proc/sysrq-trigger
fi
# shellcheck source=/dev/null
. /host/.vm/environment
bash /host/.vm/command >>/host/.vm/output 2>&1 </dev/null
echo $? >/host/.vm/status
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
