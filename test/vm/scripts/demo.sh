#!/bin/bash
# The demonstration, run as root in a machine with a TPM: two containers and a nested namespace, their lists, their proofs.
set -euo pipefail
pcr=11 work=/root/demo
mkdir -p $work && cd $work

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
do_it() { printf '$ %s\n' "$*"; "$@"; }

# bundle NAME LINE: an OCI bundle with busybox and a program of its own, which runs LINE and stays.
bundle() {
	mkdir -p "$1"/rootfs/{bin,proc,dev,sys,tmp}
	cp /bin/busybox "$1/rootfs/bin/busybox"
	for applet in sh sleep unshare id ls cat; do ln -s busybox "$1/rootfs/bin/$applet"; done
	cp /bin/true "$1/rootfs/bin/service-$1"
	echo "$1" >>"$1/rootfs/bin/service-$1" # other content than the other container's
	mkdir -p "$1/rootfs/lib/x86_64-linux-gnu" "$1/rootfs/lib64"
	cp /lib/x86_64-linux-gnu/libc.so.6 "$1/rootfs/lib/x86_64-linux-gnu/"
	cp /lib64/ld-linux-x86-64.so.2 "$1/rootfs/lib64/"
	printf '%s\n: >/ready\nwhile :; do sleep 1; done\n' "$2" >"$1/rootfs/script"
	(cd "$1" && runc spec && sed -i -e 's/"terminal": true/"terminal": false/' -e 's/"readonly": true/"readonly": false/' \
		-e 's/"sh"/"sh", "\/script"/' -e 's/"CAP_KILL"/"CAP_KILL", "CAP_SYS_ADMIN"/' config.json)
}

# start NAME: runs the bundle and waits until its line is through.
start() {
	(cd "$1" && runc run --detach --pid-file pid "$1" >log 2>&1 </dev/null)
	until [ -e "$1/rootfs/ready" ]; do sleep 0.1; done
}

# namespace_of PID: the number of its mount namespace.
namespace_of() { readlink "/proc/$1/ns/mnt" | tr -dc 0-9; }

# values TCTI BANK: a TPM's registers, as evmctl wants them.
values() { tpm2_pcrread -T "$1" "$2:all" | sed -nE 's/^ *([0-9]+) *: 0x([0-9A-F]+)$/\1 \L\2/p' | while read -r n v; do printf 'PCR-%02d: %s\n' "$n" "$v"; done; }

say "A stock kernel: $(uname -r)"
do_it imans-agent doctor

say "The agent, with the policy: all programs and executable mappings"
do_it imans-agent policy check exec
imans-agent --policy exec --pcr $pcr >agent.log 2>&1 &
agent=$!
until imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent || { cat agent.log; exit 1; }; done

say "Two containers of different images; the first makes a namespace of its own inside"
bundle web '/bin/service-web; unshare -m /bin/sh -c "/bin/id >/dev/null; : >/nested; while :; do sleep 1; done" & while [ ! -e /nested ]; do sleep 0.1; done'
bundle db '/bin/service-db; /bin/ls / >/dev/null'
start web
start db
web=$(namespace_of "$(cat web/pid)")
db=$(namespace_of "$(cat db/pid)")
do_it imans-agent ns

nested=$(imans-agent ns --json | tr -d ' \n' | grep -o '"inum":[0-9]*,"id":[0-9]*,"parent":"'"$web"':' | grep -o '^"inum":[0-9]*' | tr -dc 0-9)
for ns in native "$web" "$nested" "$db"; do
	say "The list of $ns"
	imans-agent measurements "$ns"
done

say "Each list against its own TPM, by the running agent"
for ns in native "$web" "$nested" "$db"; do
	imans-agent measurements "$ns" --format binary >"$ns.list"
	do_it imans-agent verify "$ns.list" --ns "$ns"
done

say "The agent stops, its vTPMs live on: now others' tools read the TPMs themselves"
declare -A tcti file
for ns in native "$web" "$nested" "$db"; do
	socket=$(imans-agent ns show "$ns" | sed -n 's/^tpm  *unix://p')
	tcti[$ns]=${socket:+swtpm:path=$socket}
	tcti[$ns]=${tcti[$ns]:-device:/dev/tpmrm0}
done
kill -TERM $agent
wait $agent || { cat agent.log; exit 1; }
for ns in native "$web" "$nested" "$db"; do
	file[$ns]=$(find /var/lib/imans/boots -path "*/$ns*/binary_runtime_measurements")
	for bank in sha1 sha256; do values "${tcti[$ns]}" $bank >pcrs.$bank; done
	do_it imans-agent verify "${file[$ns]}" --tpm "$(sed 's,^device:,,; s,^swtpm:path=,unix:,' <<<"${tcti[$ns]}")" | tail -n 1
	do_it evmctl ima_measurement --ignore-violations --pcrs sha1,pcrs.sha1 --pcrs sha256,pcrs.sha256 "${file[$ns]}"
done

say "One byte of a list changed: verification fails, and says where"
cp "${file[$web]}" forged.list
size=$(stat -c %s forged.list)
printf X | dd of=forged.list bs=1 seek=$((size - 4)) conv=notrunc status=none
if do_it imans-agent verify forged.list --tpm "unix:${tcti[$web]#swtpm:path=}"; then
	echo "the forged list verified" >&2
	exit 1
fi
say "Done"
runc delete --force web
runc delete --force db
imans-agent unload
