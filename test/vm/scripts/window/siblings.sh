#!/bin/sh
# Two namespaces side by side never see each other; what is above them sees both.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
for name in a b; do
	NAME=$name unshare --mount sh -c '
		. "$LIB"
		active_with "measure func=BPRM_CHECK"
		for i in 1 2 3 4 5; do run "$WORK/$NAME$i"; done
		: >"$WORK/ran-$NAME"
		until [ -e "$WORK/ran-a" ] && [ -e "$WORK/ran-b" ]; do sleep 0.1; done
		run "$WORK/${NAME}6"
		cat "$LIST" >"$WORK/list-$NAME"
		cat "$IMA/runtime_measurements_count" >"$WORK/count-$NAME"' &
done
wait
entries() { count "$WORK/$1[0-9]" "$2"; }
equal "a has its own" "$(entries a list-a)" 6
equal "a has none of b" "$(entries b list-a)" 0
equal "b has its own" "$(entries b list-b)" 6
equal "b has none of a" "$(entries a list-b)" 0
equal "a counts its own" "$(cat count-a)" "$(wc -l <list-a)"
equal "b counts its own" "$(cat count-b)" "$(wc -l <list-b)"
equal "both are in the list above" "$(entries '[ab]' "$LIST")" 12
finish
