#!/bin/sh
# What runs at one level is in its list and in those above it, each by its own policy.
. "${0%/*}/lib.sh"

cat >"$WORK/down" <<'END'
. "$LIB"
activate
# The second level has no rule at all.
[ "$1" = 2 ] || echo "measure func=BPRM_CHECK" >"$IMA/policy"
run "$WORK/at$1"
[ "$1" = 4 ] || unshare --mount sh "$WORK/down" $(($1 + 1))
cat "$LIST" >"$WORK/list$1"
END
sh "$WORK/down" 1
at() { for n in 1 2 3 4; do count "$WORK/at$n" "$WORK/list$1"; done | tr -d '\n'; }
equal "the first level's list" "$(at 1)" 1111
equal "the second level's, which wants nothing" "$(at 2)" 0000
equal "the third level's" "$(at 3)" 0011
equal "the fourth level's" "$(at 4)" 0001
for n in 1 2 3 4; do
	equal "level $n begins with boot_aggregate" "$(head -n 1 "$WORK/list$n" | cut -d ' ' -f 5)" boot_aggregate
done
finish
