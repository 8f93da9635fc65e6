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
	sleep 2 # for the entries of a list, and for what the kernel frees behind a condition that has ended
}
second() {
	warm
	warm
	for kind in static dynamic; do echo "second-$1 $kind $(./spawn "$spawns" ./$kind)"; done
}
first() {
	for kind in static dynamic; do echo "first-$1 $kind $(./spawn 1 "./fresh-$1-$kind-$2")"; done
}
# Programs are mostly older than a minute.
for condition in nothing agent kernel-ima; do
	for round in $(seq "$rounds"); do
		for kind in static dynamic; do
			{ cat $kind && printf %s "$condition$round"; } >"fresh-$condition-$kind-$round"
			chmod +x "fresh-$condition-$kind-$round"
		done
	done
done
sync
sleep 90
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
