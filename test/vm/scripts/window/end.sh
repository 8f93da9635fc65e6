#!/bin/sh
# The end of a namespace takes its list and policy along, and nothing of anybody else's.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
before=$(cat "$LIST")
i=0
while [ $i -lt 20 ]; do
	i=$((i + 1))
	N=$i unshare --mount sh -c '. "$LIB"
		activate
		[ -z "$(cat "$IMA/policy")" ] || echo "policy of another" >>"$WORK/trouble"
		[ "$(cat "$IMA/runtime_measurements_count")" = 1 ] || echo "list of another" >>"$WORK/trouble"
		echo "measure func=BPRM_CHECK" >"$IMA/policy"
		run "$WORK/p$N"
		[ "$(count "$WORK/p$N")" = 1 ] || echo "own entry missing" >>"$WORK/trouble"'
done
equal "each began anew" "$(cat trouble 2>/dev/null)" ""
equal "the list above has all of them" "$(count "$WORK/p[0-9]*")" 20
equal "and what it had before" "$(head -n "$(echo "$before" | wc -l)" "$LIST")" "$before"
equal "the policy here stayed" "$(rules)" "measure func=BPRM_CHECK"

# A list that is open while its namespace ends does not hang its reader, nor hold the others up.
PARENT=$$ unshare --mount sh -c '. "$LIB"
	active_with "measure func=BPRM_CHECK"
	run "$WORK/last"
	exec 8<"$LIST"
	exec nsenter --target "$PARENT" --mount sh -c "sleep 1; timeout 30 cat <&8 >$WORK/after-end 2>&1; echo \$? >$WORK/status"'
holds "a list open at the end does not hang" grep -qv 143 "$WORK/status"
equal "and is nobody else's" "$(count "$WORK/p[0-9]*" "$WORK/after-end")" 0
holds "the list here" timeout 30 cat "$LIST"
finish
