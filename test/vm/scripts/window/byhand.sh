#!/bin/sh
# By hand: somebody outside made this namespace active.
. "${0%/*}/lib.sh"

equal "active" "$(cat "$IMA/active")" 1
equal "its list begins as all do" "$(head -n 1 "$LIST" | cut -d ' ' -f 5)" boot_aggregate
refused "the hash is settled" "" write "$IMA/hash" sha512
holds "a policy" write "$IMA/policy" "measure func=BPRM_CHECK"
run "$WORK/own"
equal "measures" "$(count "$WORK/own")" 1
finish
