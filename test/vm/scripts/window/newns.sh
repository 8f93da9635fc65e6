#!/bin/sh
# On request: writing 1 to newns makes the next clone of the mount namespace a new IMA namespace, and only that.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
unshare --mount sh -c '. "$LIB"; cat "$IMA/active" >"$WORK/unasked"; run "$WORK/in-unasked"'
equal "a clone that nobody asked for is not active" "$(cat unasked)" 0
equal "and is in its parent's list" "$(count "$WORK/in-unasked")" 1

equal "nothing is asked for" "$(cat "$IMA/newns")" 0
for garbage in 7 -1 01 yes ""; do
	refused "neither 0 nor 1 but '$garbage'" "invalid argument" write "$IMA/newns" "$garbage"
done
equal "which asks for nothing" "$(cat "$IMA/newns")" 0
echo 1 >"$IMA/newns"
equal "a request can be read" "$(cat "$IMA/newns")" 1
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

equal "the clone has taken the request" "$(cat "$IMA/newns")" 0
equal "one request, one namespace: the next clone is as the first" "$(unshare --mount sh -c 'cat "$IMA/active"')" 0

write "$IMA/newns" 1
write "$IMA/newns" 1
equal "one by a command that has ended is the shell's" "$(cat "$IMA/newns")" 1
equal "and serves a clone" "$(unshare --mount sh -c 'cat "$IMA/active"')" 1
equal "asking twice is asking once" "$(cat "$IMA/newns") $(unshare --mount sh -c 'cat "$IMA/active"')" "0 0"

echo 1 >"$IMA/newns"
echo 0 >"$IMA/newns"
equal "a request that was taken back is gone" "$(cat "$IMA/newns")" 0
equal "and the next clone is not active" "$(unshare --mount sh -c 'cat "$IMA/active"')" 0
holds "taking back what nobody asked for is no error" write "$IMA/newns" 0
echo 1 >"$IMA/newns"
equal "it can be asked for anew" "$(cat "$IMA/newns") $(unshare --mount sh -c 'cat "$IMA/active"')" "1 1"

if [ "$(ids)" -gt 1 ]; then
	refused "others may not ask" "permission denied" as_other "echo 1 >$IMA/newns"
	refused "nor take back" "permission denied" as_other "echo 0 >$IMA/newns"
	refused "nor see" "permission denied" as_other "cat $IMA/newns"
else
	for what in "others may not ask" "nor take back" "nor see"; do skip "$what" "there is one user id only"; done
fi
finish
