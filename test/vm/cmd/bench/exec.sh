#!/bin/bash
# What an exec costs, in a machine whose clock counts instructions: prints "WHICH-CONDITION KIND NANOSECONDS" lines.
#   exec.sh compare ROUNDS SPAWNS      the agent, then the kernel's IMA with the agent's policy, each against nothing
#   exec.sh alone ROUNDS SPAWNS NAME   this boot as it is
set -Eeuo pipefail
trap 'echo "exec.sh: line $LINENO: $BASH_COMMAND" && cat /root/agent.log' ERR
mode=$1 rounds=$2 spawns=$3
# shellcheck source=test/vm/cmd/bench/rounds.sh
. /payload/rounds.sh

compare() {
	copies nothing agent kernel-ima
	settle 90
	second nothing
	for round in $(seq "$rounds"); do
		first nothing "$round"
		start --log-level info
		sleep 30 # its start leaves work to Go's runtime
		second agent
		first agent "$round"
		stop
		second nothing
	done
	for round in $(seq "$rounds"); do second nothing; done
	printf 'measure func=BPRM_CHECK mask=MAY_EXEC\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n' >/sys/kernel/security/ima/policy
	for round in $(seq "$rounds"); do second kernel-ima; first kernel-ima "$round"; done
}

case $mode in
compare) compare ;;
alone)
	settle 90
	for round in $(seq "$rounds"); do second "$4"; done
	;;
esac
