#!/bin/bash
# What a vTPM costs a container, in a machine whose clock counts instructions: prints "CONDITION KIND NUMBER" lines.
#   vtpm.sh ROUNDS CONTAINERS
# Each round starts containers with a vTPM, which the pool has ready, and as many without, in turns of which comes first.
set -Eeuo pipefail
trap '{ echo "vtpm.sh: line $LINENO: $BASH_COMMAND"; tail -n 50 /root/agent.log; cat /root/runtime.log || true; } >&2' ERR
rounds=$1 containers=$2 state=/var/lib/imans
# The clock leaps while the machine does nothing, so nothing may wait for a disk: seconds would pass.
mkdir -p $state && mount -t tmpfs tmpfs $state && mount -t tmpfs tmpfs /root
cp /payload/imans-agent /root/ && cd /root
ln -sf imans-agent imans-runc
mkdir -p rootfs && (cd rootfs && mkdir -p usr proc dev sys tmp && for d in bin sbin lib lib64; do ln -sf usr/$d $d; done)
for kind in true false; do
	mkdir -p $kind
	(cd $kind && runc spec && sed -i -e 's/"terminal": true/"terminal": false/' -e 's/"sh"/"sleep", "100000"/' -e 's,"rootfs","/root/rootfs",' \
		-e 's,"mounts": \[,"annotations": {"imans.dev/vtpm": "'$kind'"}\, "mounts": [{"destination": "/usr"\, "type": "bind"\, "source": "/usr"\, "options": ["bind"\, "ro"]}\,,' config.json)
done

ready() { # the pool is full, and nothing of earlier containers is left
	until [ "$(find $state/pool -name identity.json | wc -l)" -ge "$containers" ] && [ -z "$(ls -A $state/containers)" ] && ! pgrep -x swtpm >/dev/null; do sleep 0.2; done
	sleep 2
}
anonymous() { awk '/^RssAnon:/ { print $2 }' "/proc/$agent/status"; }
start() { # start KIND NUMBER
	./imans-runc create --bundle "$1" "bench-$1-$2" >>runtime.log 2>&1 </dev/null
	./imans-runc start "bench-$1-$2"
}
# measure CONDITION KIND: one number for each container.
measure() {
	ready
	before=$(anonymous)
	for n in $(seq "$containers"); do
		begun=$(date +%s%N)
		start "$2" "$n"
		echo "$1 start $(($(date +%s%N) - begun))"
	done
	sleep 2
	[ "$(pgrep -cx swtpm || true)" -ge "$([ "$2" = true ] && echo "$containers" || echo 0)" ]
	echo "$1 agent $((($(anonymous) - before) / containers))"
	if [ "$2" = true ]; then
		for dir in "$state"/containers/*/tpm0; do
			pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/' "$dir/process.json")
			echo "$1 swtpm $(awk '/^Pss:/ { print $2 }' "/proc/$pid/smaps_rollup")"
		done
	fi
	for n in $(seq "$containers"); do ./imans-runc delete --force "bench-$2-$n"; done
}

mkdir -p /etc/imans && echo '{"on_failure": "fail"}' >/etc/imans/runtime.json
./imans-agent --policy exec --tpm none --namespaces containers --vtpm-pool "$containers" >agent.log 2>&1 &
agent=$!
until ./imans-agent ns >/dev/null 2>&1; do sleep 0.1; kill -0 $agent; done
measure warm true >/dev/null
measure warm false >/dev/null
for round in $(seq "$rounds"); do
	if [ $((round % 2)) = 0 ]; then
		measure without false
		measure with true
	else
		measure with true
		measure without false
	fi
done
kill -TERM $agent
wait $agent
