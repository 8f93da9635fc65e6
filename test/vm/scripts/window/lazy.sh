#!/bin/sh
# Lazily: a namespace shares its parent's until a policy is first installed in it.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
unshare --mount sh -c '. "$LIB"
	cat "$IMA/active" >"$WORK/active-before"
	run "$WORK/shared"
	echo "measure func=BPRM_CHECK" >"$IMA/policy"
	cat "$IMA/active" >"$WORK/active-after"
	run "$WORK/own"
	cat "$LIST" >"$WORK/list"'
equal "not active at first" "$(cat active-before)" 0
equal "active with its first policy" "$(cat active-after)" 1
equal "what ran before is its parent's" "$(count "$WORK/shared")" 1
equal "and not its own" "$(count "$WORK/shared" list)" 0
equal "what ran after is its own" "$(count "$WORK/own" list)" 1
equal "and its parent's" "$(count "$WORK/own")" 1
equal "its list begins as all do" "$(head -n 1 list | cut -d ' ' -f 5)" boot_aggregate
finish
