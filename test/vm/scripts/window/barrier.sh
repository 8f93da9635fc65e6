#!/bin/sh
# A list that is opened after a program ran has it, and so has the counter.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
last=$(cat "$IMA/runtime_measurements_count")
rounds=${ROUNDS:-40} i=0 missed="" stale=""
while [ "$i" -lt "$rounds" ]; do
	i=$((i + 1))
	run "$WORK/p$i"
	grep -qw "$WORK/p$i" "$LIST" || missed="$missed $i"
	n=$(cat "$IMA/runtime_measurements_count")
	[ "$n" -gt "$last" ] || stale="$stale $i"
	last=$n
done
equal "a list has what ran before" "$missed" ""
equal "a counter counts what ran before" "$stale" ""
equal "each once" "$(count "$WORK/p[0-9]*")" "$rounds"
equal "count and list agree" "$(cat "$IMA/runtime_measurements_count")" "$(wc -l <"$LIST")"
finish
