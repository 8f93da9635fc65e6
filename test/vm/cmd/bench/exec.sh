#!/bin/bash
# What an exec costs, in a machine whose clock counts instructions: prints "WHICH-CONDITION KIND NANOSECONDS" lines.
# Arguments: rounds, spawns in each measurement. What a spawn costs drifts with the machine's age by more than what is to be
# measured, so each round of a condition stands between two without any.
set -euo pipefail
rounds=$1 spawns=$2
cp /payload/{spawn,static,dynamic,imans-agent} /root/ && cd /root
mount -o remount,noatime / 2>/dev/null || true

# second CONDITION: programs that ran before; first CONDITION ROUND: programs that never ran, fresh copies.
warm() {
	for kind in static dynamic; do ./spawn 20 ./$kind >/dev/null; done
	sleep 0.2 # an entry of the list, where there is one
}
second() {
	warm
	warm
	for kind in static dynamic; do echo "second-$1 $kind $(./spawn "$spawns" ./$kind)"; done
}
first() {
	for kind in static dynamic; do
		cp $kind "fresh-$1-$kind-$2" && printf %s "$1$2" >>"fresh-$1-$kind-$2"
		touch -d '1 hour ago' "fresh-$1-$kind-$2"
		sync
		sleep 0.1
		echo "first-$1 $kind $(./spawn 1 "./fresh-$1-$kind-$2")"
	done
}
start() {
	tpm2_pcrreset -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent || { cat agent.log >&2; exit 1; }; done
}
stop() {
	kill -TERM $agent
	wait $agent
	./imans-agent unload >/dev/null
	rm -rf /var/lib/imans
}

for _ in $(seq 5); do warm; done
second nothing
for round in $(seq "$rounds"); do
	first nothing "$round"
	start
	second agent
	first agent "$round"
	stop
	second nothing
done
for round in $(seq "$rounds"); do second nothing; done >base
cat base
printf 'measure func=BPRM_CHECK mask=MAY_EXEC\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n' >/sys/kernel/security/ima/policy
for round in $(seq "$rounds"); do second kernel-ima; first kernel-ima "$round"; done
