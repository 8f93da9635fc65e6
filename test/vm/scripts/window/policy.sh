#!/bin/sh
# The policy file does as the kernel's.
. "${0%/*}/lib.sh"

activate
exec 9>"$IMA/policy"
echo "measure func=BPRM_CHECK uid=0" >&9
echo "# a comment" >&9
echo "dont_measure fsmagic=0x9fa0" >&9
run "$WORK/too-early"
equal "no effect before the close" "$(count "$WORK/too-early")" 0
refused "one writer at a time" "busy" write "$IMA/policy" "measure func=MMAP_CHECK"
exec 9>&-
"$WORK/too-early"
equal "effect at the close" "$(count "$WORK/too-early")" 1
equal "written in pieces" "$(rules)" "measure func=BPRM_CHECK uid=0
dont_measure fsmagic=0x9fa0"

holds "a second write" write "$IMA/policy" "measure func=MMAP_CHECK mask=MAY_EXEC"
equal "appends" "$(rules | wc -l)" 3
equal "reads back as the kernel prints it" "$(rules | tail -n 1)" "measure func=MMAP_CHECK mask=MAY_EXEC"

before=$(cat "$IMA/policy")
for bad in "measure func=NOTHING" "measure func=BPRM_CHECK func=BPRM_CHECK" "gauge func=BPRM_CHECK" "measure uid=none" "x"; do
	refused "refused: $bad" "invalid argument" write "$IMA/policy" "$bad"
done
exec 9>"$IMA/policy"
echo "audit func=BPRM_CHECK" >&9
refused "one bad rule" "invalid argument" sh -c 'echo "measure func=NOTHING" >&9'
exec 9>&-
equal "spoils its whole write, and the old policy stays" "$(cat "$IMA/policy")" "$before"
run "$WORK/old-policy"
equal "and works" "$(count "$WORK/old-policy")" 1

echo "audit func=BPRM_CHECK" >"$WORK/rules"
holds "the name of a file" write "$IMA/policy" "$WORK/rules"
equal "loads it" "$(rules | tail -n 1)" "audit func=BPRM_CHECK"
refused "no such file" "no such file" write "$IMA/policy" "$WORK/none"
refused "not an absolute name" "invalid argument" write "$IMA/policy" "rules"
equal "neither changed anything" "$(rules | wc -l)" 4

if [ "$(ids)" -gt 1 ]; then
	refused "others may not write" "permission denied" as_other "echo 'audit func=BPRM_CHECK' >$IMA/policy"
	refused "others may not read" "permission denied" as_other "cat $IMA/policy"
else
	skip "others may not write" "there is one user id only"
fi
refused "root of a user namespace below may not write" "permission denied" \
	unshare --user --map-root-user sh -c 'echo "audit func=BPRM_CHECK" >"$IMA/policy"'
equal "nothing came of it" "$(rules | wc -l)" 4

n=$(rules | wc -l)
while [ "$n" -lt 1024 ]; do
	n=$((n + 1))
	echo "dont_measure fsmagic=$(printf '0x%x' $((n + 4096)))"
done >"$WORK/many"
while read -r rule; do echo "$rule"; done <"$WORK/many" >"$IMA/policy"
equal "1,024 rules" "$(rules | wc -l)" 1024
refused "not one more" "" write "$IMA/policy" "audit func=MMAP_CHECK"
equal "the rest stays" "$(rules | wc -l)" 1024
run "$WORK/by-many"
equal "and works" "$(count "$WORK/by-many")" 1
finish
