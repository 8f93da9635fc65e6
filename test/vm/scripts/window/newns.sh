#!/bin/sh
# On request: writing 1 to newns makes the next clone of the mount namespace a new IMA namespace, and only that.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
unshare --mount sh -c '. "$LIB"; cat "$IMA/active" >"$WORK/unasked"; run "$WORK/in-unasked"'
equal "a clone that nobody asked for is not active" "$(cat unasked)" 0
equal "and is in its parent's list" "$(count "$WORK/in-unasked")" 1

refused "anything but 1" "invalid argument" write "$IMA/newns" 7
echo 1 >"$IMA/newns"
unshare --mount sh -c '. "$LIB"
	cat "$IMA/active" >"$WORK/asked"
	head -n 1 "$LIST" | cut -d " " -f 5 >"$WORK/asked-first"
	echo "measure func=BPRM_CHECK" >>"$IMA/policy"
	run "$WORK/in-asked"
	cat "$LIST" >"$WORK/asked-list"'
equal "a clone that was asked for is active" "$(cat asked)" 1
equal "and has a list of its own" "$(cat asked-first)" boot_aggregate
equal "with what ran there" "$(count "$WORK/in-asked" asked-list)" 1
equal "and nothing of its parent's" "$(count "$WORK/in-unasked" asked-list)" 0
equal "which has what ran there, too" "$(count "$WORK/in-asked")" 1

equal "one request, one namespace: the next clone is as the first" "$(unshare --mount sh -c 'cat "$IMA/active"')" 0
if [ "$(ids)" -gt 1 ]; then
	refused "others may not ask" "permission denied" as_other "echo 1 >$IMA/newns"
else
	skip "others may not ask" "there is one user id only"
fi
finish
