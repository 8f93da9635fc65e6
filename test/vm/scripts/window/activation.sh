#!/bin/sh
# Before a namespace is active its files can't be read, and hash and template can be chosen; then it has a list of its own.
. "${0%/*}/lib.sh"

equal "not active at first" "$(cat "$IMA/active")" 0
for file in policy ascii_runtime_measurements binary_runtime_measurements runtime_measurements_count violations; do
	holds "$file is there" test -e "$IMA/$file"
	refused "$file can't be read before" "" cat "$IMA/$file"
done
holds "hash can be read before" cat "$IMA/hash"
holds "template_name can be read before" cat "$IMA/template_name"
refused "no such hash" "invalid argument" write "$IMA/hash" md6
refused "no such template" "invalid argument" write "$IMA/template_name" ima-none
refused "active is 1 or nothing" "invalid argument" write "$IMA/active" 2
holds "hash can be set" write "$IMA/hash" md5
holds "template_name can be set" write "$IMA/template_name" ima-ngv2
holds "hash can be set again" write "$IMA/hash" sha512
equal "hash reads back" "$(cat "$IMA/hash")" sha512
equal "template_name reads back" "$(cat "$IMA/template_name")" ima-ngv2
run ./before
holds "activate" write "$IMA/active" 1
equal "active" "$(cat "$IMA/active")" 1

equal "one entry" "$(wc -l <"$LIST")" 1
equal "its name" "$(cut -d ' ' -f 5 "$LIST")" boot_aggregate
equal "its template" "$(cut -d ' ' -f 3 "$LIST")" ima-ngv2
equal "its hash" "$(cut -d ' ' -f 4 "$LIST" | cut -d : -f 1,2)" ima:sha512
equal "its digest's length" "$(cut -d ' ' -f 4 "$LIST" | cut -d : -f 3 | tr -d '\n' | wc -c)" 128
equal "its PCR" "$(cut -d ' ' -f 1 "$LIST")" 10
equal "runtime_measurements_count" "$(cat "$IMA/runtime_measurements_count")" 1
equal "violations" "$(cat "$IMA/violations")" 0
equal "the policy is empty" "$(cat "$IMA/policy")" ""
run ./unwanted
equal "an empty policy measures nothing" "$(cat "$IMA/runtime_measurements_count")" 1
refused "hash is settled now" "" write "$IMA/hash" sha256
refused "template_name is settled now" "" write "$IMA/template_name" ima-ng
equal "the hash stayed" "$(cat "$IMA/hash")" sha512
refused "active for good" "" write "$IMA/active" 0
equal "still active" "$(cat "$IMA/active")" 1

echo "measure func=BPRM_CHECK" >"$IMA/policy"
run "$WORK/wanted"
equal "measured by the own policy" "$(count "$WORK/wanted")" 1
equal "with the own hash" "$(sed -n "s,^10 [0-9a-f]* ima-ngv2 ima:sha512:\([0-9a-f]*\) $WORK/wanted,\1,p" "$LIST")" \
	"$(sha512sum <"$WORK/wanted" | cut -d ' ' -f 1)"
equal "own counter" "$(cat "$IMA/runtime_measurements_count")" "$(wc -l <"$LIST")"
equal "nothing from before" "$(grep -c before "$LIST")" 0
finish
