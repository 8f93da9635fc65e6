#!/bin/bash
# What a mount namespace costs, in a machine whose clock counts instructions: prints "CONDITION KIND NANOSECONDS" lines.
#   clone.sh ROUNDS CLONES
# Each round of a condition stands between two without an agent.
set -euo pipefail
rounds=$1 clones=$2
cp /payload/{clone,static,imans-agent} /root/ && cd /root
own=/sys/kernel/security/ima/runtime_measurements_count

# measure CONDITION COUNTER: a counter to read as the barrier; the kernel's own where there is none.
measure() {
	./clone 30 ./static - >/dev/null
	sleep 2
	echo "$1 clone $(./clone "$clones" - "$2")"
	echo "$1 program $(./clone $((clones / 10)) ./static "$2")"
	echo "$1 reading $(./clone 0 - "$2")"
}
start() {
	./imans-agent --policy exec --tpm none --ns-tpm none --namespaces "$1" >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent || { cat agent.log >&2; exit 1; }; done
}
stop() {
	kill -TERM $agent
	wait $agent
	./imans-agent unload >/dev/null
	rm -rf /var/lib/imans
}
sleep 30
measure warm "$own" >/dev/null
measure nothing "$own"
for _ in $(seq "$rounds"); do
	for mode in lazy all; do
		start $mode
		measure $mode /run/imans/fs/ima/runtime_measurements_count
		stop
		measure nothing "$own"
	done
done
