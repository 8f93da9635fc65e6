#!/bin/bash
# What an exec costs in a mount namespace: without the agent, with it, and with a gate. Prints "WHICH-CONDITION KIND NANOSECONDS" lines, by the
# machine's clock: instructions where that counts them.
#   gate.sh ROUNDS SPAWNS REST
# REST is how many seconds the machine is left to itself before it is measured. See exec.sh for why each round stands between two without.
set -Eeuo pipefail
trap '{ echo "gate.sh: line $LINENO: $BASH_COMMAND"; tail -n 50 /root/agent.log; } >&2' ERR
rounds=$1 spawns=$2 rest=$3
cp /payload/{spawn,static,dynamic,imans-agent} /root/ && cd /root
mount -o remount,noatime / 2>/dev/null || true
echo 0 >/proc/sys/kernel/randomize_va_space
unshare --mount --propagation private sleep infinity &
space=$!
inside() { nsenter --target $space --mount --wd=/root -- "$@"; }

warm() {
	for kind in static dynamic; do inside ./spawn 30 ./$kind >/dev/null; done
	sleep 2
}
second() {
	warm
	warm
	for kind in static dynamic; do echo "second-$1 $kind $(inside ./spawn "$spawns" ./$kind)"; done
}
first() {
	for kind in static dynamic; do echo "first-$1 $kind $(inside ./spawn 1 "./fresh-$1-$kind-$2")"; done
}
for condition in nothing agent gate; do
	for round in $(seq "$rounds"); do
		for kind in static dynamic; do
			{ cat $kind && printf %s "$condition$round"; } >"fresh-$condition-$kind-$round"
			chmod +x "fresh-$condition-$kind-$round"
		done
	done
done
sync
sleep "$rest" # programs are mostly older than a minute
for _ in $(seq 5); do warm; done
second nothing
for round in $(seq "$rounds"); do
	first nothing "$round"
	tpm2_pcrreset -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 --gate-timeout 1m >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent; done
	inside true # its list and its vTPM begin
	sleep "$((rest / 3))"
	ns=$(readlink /proc/$space/ns/mnt) && ns=${ns//[^0-9]/}
	first agent "$round"
	./imans-agent ns gate "$ns" exec >/dev/null
	second gate
	first gate "$round"
	./imans-agent ns show "$ns" --json | grep -q '"violations": *0'
	kill -TERM $agent
	wait $agent
	./imans-agent unload >/dev/null
	rm -rf /var/lib/imans
	second nothing
done
kill $space
