#!/bin/bash
# What an exec costs, in a machine whose clock counts instructions: prints "CONDITION KIND NANOSECONDS" lines.
# Arguments: repetitions of a whole measurement, spawns in each.
set -euo pipefail
rounds=$1 spawns=$2
cp /payload/{spawn,static,dynamic,imans-agent} /root/ && cd /root
mount -o remount,noatime / 2>/dev/null || true

# second CONDITION: programs that ran before; first CONDITION: a program that never ran, each round a fresh copy.
second() {
	for kind in static dynamic; do
		./spawn 5 ./$kind >/dev/null
		sleep 0.1 # an entry of the list, where there is one
		./spawn 5 ./$kind >/dev/null
		for _ in $(seq "$rounds"); do echo "second-$1 $kind $(./spawn "$spawns" ./$kind)"; done
	done
}
first() {
	for kind in static dynamic; do
		for i in $(seq "$rounds"); do
			cp $kind "fresh-$1-$kind-$i" && printf %s "$1$i" >>"fresh-$1-$kind-$i"
			sync
			sleep 0.1
			echo "first-$1 $kind $(./spawn 1 "./fresh-$1-$kind-$i")"
		done
	done
}

second nothing
first nothing
tpm2_pcrreset -T device:/dev/tpmrm0 16
./imans-agent --policy exec --pcr 16 >agent.log 2>&1 &
agent=$!
until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent || { cat agent.log >&2; exit 1; }; done
second agent
first agent
kill -TERM $agent
wait $agent
./imans-agent unload >/dev/null
second nothing-again
printf 'measure func=BPRM_CHECK mask=MAY_EXEC\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n' >/sys/kernel/security/ima/policy
second kernel-ima
first kernel-ima
