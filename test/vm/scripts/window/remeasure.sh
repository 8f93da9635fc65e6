#!/bin/sh
# Content that changed is measured again when it is used next; content that did not is not.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
p=$WORK/p
run "$p"
for _ in 1 2 3; do "$p"; done
equal "once" "$(count "$p")" 1
touch "$p" && "$p"
equal "touched, not changed" "$(count "$p")" 1
chmod 700 "$p" && "$p"
equal "another mode, not changed" "$(count "$p")" 1
sleep 0.05 && echo "# more" >>"$p" && "$p" && "$p"
equal "written" "$(count "$p")" 2
sleep 0.05 && truncate -s $(($(wc -c <"$p") - 3)) "$p" && "$p" && "$p"
equal "truncated" "$(count "$p")" 3
if type mapstore >/dev/null 2>&1; then
	sleep 0.05 && mapstore "$p" 11 "# changed" && "$p" && "$p"
	equal "stored through a mapping" "$(count "$p")" 4
else
	not_ok "stored through a mapping" "no program mapstore"
fi
sleep 0.05 && program new && mv new "$p" && "$p" && "$p"
equal "another file renamed over it" "$(count "$p")" 5
mv "$p" "$WORK/q" && "$WORK/q"
equal "a rename is no change" "$(count "$WORK/q")" 0
equal "each with its digest" "$(grep -w "$p" "$LIST" | cut -d ' ' -f 4 | sort -u | wc -l)" 5
equal "the last one's is the file's" "$(grep -w "$p" "$LIST" | tail -n 1 | cut -d ' ' -f 4 | sed 's/.*://')" "$(sha256sum <"$WORK/q" | cut -d ' ' -f 1)"

mkdir lower upper work merged && program lower/below && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr overlay merged
m=$WORK/merged/below
"$m" && "$m"
equal "below an overlay, once" "$(count "$m")" 1
sleep 0.05 && echo "# above" >>"$m" && "$m" && "$m"
equal "copied up" "$(count "$m")" 2
sleep 0.05 && echo "# still above" >>"$m" && "$m"
equal "and changed again" "$(count "$m")" 3

i=0
run "$WORK/theirs"
while [ $i -lt 3 ]; do
	i=$((i + 1))
	sleep 0.05
	unshare --mount sh -c 'echo "# by another namespace" >>"$WORK/theirs"'
	"$WORK/theirs"
done
equal "changed by another namespace" "$(count "$WORK/theirs")" 4
finish
