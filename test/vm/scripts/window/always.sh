#!/bin/sh
# On every clone: a namespace is active from its birth, with the policy that all begin with (here: measure func=BPRM_CHECK).
. "${0%/*}/lib.sh"

equal "active from the beginning" "$(cat "$IMA/active")" 1
equal "with a policy" "$(rules)" "measure func=BPRM_CHECK"
equal "its list begins as all do" "$(head -n 1 "$LIST" | cut -d ' ' -f 5)" boot_aggregate
refused "the hash is settled" "" write "$IMA/hash" sha512
unshare --mount sh -c '. "$LIB"; cat "$IMA/active" >"$WORK/active"; run "$WORK/inner"; cat "$LIST" >"$WORK/list"'
equal "so is a clone" "$(cat active)" 1
equal "which measures at once" "$(count "$WORK/inner" list)" 1
equal "for its parent, too" "$(count "$WORK/inner")" 1
finish
