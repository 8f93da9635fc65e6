#!/bin/bash
# How long it takes from a hook until the machine's TPM has the entry, by the clock of a machine whose clock is the host's.
#   latency.sh PROGRAMS
# Prints "bare extend MICROSECONDS" lines, and "CONDITION p50|p99|max MICROSECONDS". Then programs run in a namespace without a gate and with
# one, and look by themselves, as the first thing that they do: "first-act none|gate MICROSECONDS" is how long each ran before the TPM had it.
set -Eeuo pipefail
trap '{ echo "latency.sh: line $LINENO: $BASH_COMMAND"; tail -n 50 /root/agent.log; } >&2' ERR
cp /payload/{imans-agent,latency,firstact} /root/ && cd /root
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
firstact() { # firstact CONDITION
	tpm2_pcrreset -Q -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 --gate-timeout 1m >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent; done
	unshare --mount --propagation private sleep infinity &
	space=$!
	sleep 5
	ns=$(readlink /proc/$space/ns/mnt) && ns=${ns//[^0-9]/}
	nsenter --target $space --mount true # its list and its vTPM begin
	sleep 5
	[ "$1" = none ] || ./imans-agent ns gate "$ns" exec >/dev/null
	log=$(echo /var/lib/imans/boots/*/ns/"$ns"-*/binary_runtime_measurements)
	mkdir "act-$1"
	for i in $(seq "$programs"); do
		printf '#!/root/firstact %s /run/imans/agent.sock %s wait\n# %s\n' "$log" "$ns" "$i" >"act-$1/$i"
	done
	chmod +x "act-$1"/*
	for program in "act-$1"/*; do
		echo "first-act $1 $(nsenter --target $space --mount --wd=/root -- "/root/$program")"
		sleep 0.1
	done
	kill $space && kill -TERM $agent && wait $agent
	./imans-agent unload >/dev/null && rm -rf /var/lib/imans
}
programs=$1
./latency extends 50
measure quiet 100ms
measure steady 10ms
measure burst 0s
firstact none
firstact gate
./latency extends 50
