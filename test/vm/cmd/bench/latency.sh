#!/bin/bash
# How long it takes from a hook until the machine's TPM has the entry, by the clock of a machine whose clock is the host's.
#   latency.sh PROGRAMS
# Prints "bare extend MICROSECONDS" lines, and "CONDITION p50|p99|max MICROSECONDS".
set -Eeuo pipefail
trap '{ echo "latency.sh: line $LINENO: $BASH_COMMAND"; tail -n 50 /root/agent.log; } >&2' ERR
cp /payload/{imans-agent,latency} /root/ && cd /root
measure() { # measure CONDITION PAUSE
	tpm2_pcrreset -Q -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 --ns-tpm none >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent; done
	sleep 5
	mkdir "$1" && ./latency run "$1" "$programs" "$2"
	for _ in $(seq 600); do
		said=$(./latency status /run/imans/agent.sock)
		count=${said#*\"count\":} && count=${count%%,*}
		[ "$count" -lt "$programs" ] || break
		sleep 0.1
	done
	[ "$count" -ge "$programs" ]
	for part in p50 p99 max; do
		value=${said#*\""$part"_us\":} && echo "$1 $part ${value%%[,\}]*}"
	done
	kill -TERM $agent && wait $agent
	./imans-agent unload >/dev/null && rm -rf /var/lib/imans
}
programs=$1
./latency extends 50
measure quiet 100ms
measure steady 10ms
measure burst 0s
./latency extends 50
