#!/bin/bash
# What an exec costs in a mount namespace: without the agent, with it, and with a gate. Prints "WHICH-CONDITION KIND NANOSECONDS" lines, by the
# machine's clock: instructions where that counts them.
#   gate.sh ROUNDS SPAWNS REST
# REST is how many seconds the machine is left to itself before it is measured.
set -Eeuo pipefail
trap '{ echo "gate.sh: line $LINENO: $BASH_COMMAND"; tail -n 50 /root/agent.log; } >&2' ERR
rounds=$1 spawns=$2 rest=$3
# shellcheck source=test/vm/cmd/bench/rounds.sh
. /payload/rounds.sh
unshare --mount --propagation private sleep infinity &
space=$!
inside() { nsenter --target $space --mount --wdns=/root -- "$@"; }

copies nothing agent gate
settle "$rest"
second nothing
for round in $(seq "$rounds"); do
	first nothing "$round"
	start --gate-timeout 1m
	inside true # its list and its vTPM begin
	sleep "$((rest / 3))"
	ns=$(readlink /proc/$space/ns/mnt) && ns=${ns//[^0-9]/}
	first agent "$round"
	./imans-agent ns gate "$ns" exec >/dev/null
	second gate
	first gate "$round"
	./imans-agent ns show "$ns" --json | grep -q '"violations": *0'
	stop
	second nothing
done
kill $space
