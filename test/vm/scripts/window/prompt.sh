#!/bin/sh
# The next event after a policy's close is judged by it.
. "${0%/*}/lib.sh"

activate
run "$WORK/known"
equal "an empty policy wants nothing" "$(count "$WORK/known")" 0
echo "measure func=BPRM_CHECK fowner=0" >"$IMA/policy"
"$WORK/known"
equal "what the old policy did not want is measured at once" "$(count "$WORK/known")" 1
echo "audit func=BPRM_CHECK" >"$IMA/policy"
"$WORK/known"
equal "what was measured under the old policy is not measured again" "$(count "$WORK/known")" 1

if [ "$(ids)" -gt 1 ]; then
	i=0 late=""
	while [ $i -lt 30 ]; do
		i=$((i + 1))
		program "$WORK/of$i"
		chown $((1000 + i)) "$WORK/of$i"
		"$WORK/of$i"
		echo "measure func=BPRM_CHECK fowner=$((1000 + i))" >"$IMA/policy"
		"$WORK/of$i"
		[ "$(count "$WORK/of$i")" = 1 ] || late="$late $i"
	done
	equal "thirty changes, each at once" "$late" ""
else
	skip "thirty changes, each at once" "there is one user id only"
fi

i=0 late=""
while [ $i -lt 20 ]; do
	i=$((i + 1))
	got=$(N=$i unshare --mount sh -c '
		. "$LIB"
		activate && program "$WORK/in$N" && "$WORK/in$N" && echo "measure func=BPRM_CHECK" >"$IMA/policy" && "$WORK/in$N"
		count "$WORK/in$N"')
	[ "$got" = 1 ] || late="$late $i:$got"
done
equal "the first policy of twenty namespaces, each at once" "$late" ""
finish
