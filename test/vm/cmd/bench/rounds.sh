# shellcheck shell=bash
# What exec.sh and gate.sh have in common; they source it, with rounds and spawns set. What a spawn costs drifts with the machine's age by more
# than what is to be measured, so each round of a condition stands between two without any. Addresses are not randomized: they change how many
# pages a process touches.
cp /payload/{spawn,static,dynamic,imans-agent} /root/
cd /root || exit
mount -o remount,noatime / 2>/dev/null || true
# Whole in memory from the beginning: whoever hashes a file reads all of it, and the kernel maps what it has around each page that a program touches.
cat spawn static dynamic imans-agent >/dev/null
ldd dynamic | grep -o '/[^ ]*' | xargs cat >/dev/null
echo 0 >/proc/sys/kernel/randomize_va_space

# where the programs run
inside() { "$@"; }

# second CONDITION: programs that ran before; first CONDITION ROUND: programs that never ran, fresh copies.
warm() {
	for kind in static dynamic; do inside ./spawn 30 ./$kind >/dev/null; done
	sleep 2 # for the entries of a list, and for what the kernel frees behind a condition that has ended
}
second() {
	warm
	warm
	for kind in static dynamic; do echo "second-$1 $kind $(inside ./spawn "${spawns:?}" ./$kind)"; done
}
first() {
	for kind in static dynamic; do echo "first-$1 $kind $(inside ./spawn 1 "./fresh-$1-$kind-$2")"; done
}

# copies CONDITION...: what first runs
copies() {
	for condition; do
		for round in $(seq "${rounds:?}"); do
			for kind in static dynamic; do
				{ cat $kind && printf %s "$condition$round"; } >"fresh-$condition-$kind-$round"
				chmod +x "fresh-$condition-$kind-$round"
			done
		done
	done
	sync
}

# settle SECONDS: programs are mostly older than a minute
settle() {
	sleep "$1"
	for _ in $(seq 5); do warm; done
}

# start OPTION...: the agent
start() {
	tpm2_pcrreset -T device:/dev/tpmrm0 16
	./imans-agent --policy exec --pcr 16 "$@" >agent.log 2>&1 &
	agent=$!
	until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 "$agent"; done
}
stop() {
	kill -TERM "$agent"
	wait "$agent"
	./imans-agent unload >/dev/null
	rm -rf /var/lib/imans
}
