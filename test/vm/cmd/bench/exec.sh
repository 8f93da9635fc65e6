#!/bin/bash
# What an exec costs, in a machine whose clock counts instructions: prints "WHICH-CONDITION KIND NANOSECONDS" lines.
#   exec.sh compare ROUNDS SPAWNS      the agent, then the kernel's IMA with the agent's policy, each against nothing
#   exec.sh alone ROUNDS SPAWNS NAME   this boot as it is
# What a spawn costs drifts with the machine's age by more than what is to be measured, so each round of a condition stands
# between two without any. Addresses are not randomized: they change how many pages a process touches.
set -Eeuo pipefail
trap 'echo "exec.sh: line $LINENO: $BASH_COMMAND" && cat /root/agent.log' ERR
mode=$1 rounds=$2 spawns=$3
cp /payload/{spawn,static,dynamic,imans-agent} /root/ && cd /root
mount -o remount,noatime / 2>/dev/null || true
echo 0 >/proc/sys/kernel/randomize_va_space

# second CONDITION: programs that ran before; first CONDITION ROUND: programs that never ran, fresh copies.
warm() {
	for kind in static dynamic; do ./spawn 30 ./$kind >/dev/null; done
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
start() {
	tpm2_pcrreset -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent; done
	sleep 30 # its start leaves work to Go's runtime
}
stop() {
	kill -TERM $agent
	wait $agent
	./imans-agent unload >/dev/null
	rm -rf /var/lib/imans
}
compare() {
	for condition in nothing agent kernel-ima; do
		for round in $(seq "$rounds"); do
			for kind in static dynamic; do
				{ cat $kind && printf %s "$condition$round"; } >"fresh-$condition-$kind-$round"
				chmod +x "fresh-$condition-$kind-$round"
			done
		done
	done
	sync
	sleep 90 # programs are mostly older than a minute
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
	for round in $(seq "$rounds"); do second nothing; done
	printf 'measure func=BPRM_CHECK mask=MAY_EXEC\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n' >/sys/kernel/security/ima/policy
	for round in $(seq "$rounds"); do second kernel-ima; first kernel-ima "$round"; done
}

case $mode in
compare) compare ;;
alone)
	sleep 90
	for _ in $(seq 5); do warm; done
	for round in $(seq "$rounds"); do second "$4"; done
	;;
esac
