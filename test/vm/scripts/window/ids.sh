#!/bin/sh
# Rules name ids as they are here.
. "${0%/*}/lib.sh"

activate
equal "root here" "$(id -u)" 0
holds "root's rule" write "$IMA/policy" "measure func=BPRM_CHECK uid=0"
equal "reads back as written" "$(rules)" "measure func=BPRM_CHECK uid=0"
run "$WORK/by-root"
equal "root's program is measured" "$(count "$WORK/by-root")" 1
if [ "$(ids)" -gt 1 ]; then
	chmod 755 "$WORK"
	program "$WORK/by-other" && as_other "$WORK/by-other"
	equal "another user's is not" "$(count "$WORK/by-other")" 0
	holds "another user's rule" write "$IMA/policy" "measure func=BPRM_CHECK fowner=7"
	program "$WORK/owned" && chown 7 "$WORK/owned" && as_other "$WORK/owned"
	equal "by the file's owner" "$(count "$WORK/owned")" 1
	as_other "$WORK/by-other"
	equal "of which another is none" "$(count "$WORK/by-other")" 0
	equal "owner reads back" "$(rules | tail -n 1)" "measure func=BPRM_CHECK fowner=7"
else
	refused "an id that is none here" "invalid argument" write "$IMA/policy" "measure func=BPRM_CHECK uid=12345"
fi
finish
