#!/bin/sh
# One namespace of many at the same time, with a HASH, a TEMPLATE and a policy of its own, for files of the user NUMBER. It begins
# when the file START is there, and stays, once it is done, until the file END is.
. "${0%/*}/lib.sh"

echo "$HASH" >"$IMA/hash" && echo "$TEMPLATE" >"$IMA/template_name"
active_with "measure func=BPRM_CHECK fowner=$NUMBER"
p=$WORK/p
program "$p" && chown "$NUMBER" "$p"
program "$WORK/other" && chown "$((NUMBER + 1))" "$WORK/other"
: >"$WORK/ready"
until [ -e "$START" ]; do sleep 0.1; done
"$p" && "$p" && "$WORK/other"
equal "its own, once" "$(count "$p")" 1
equal "what only its neighbour wants" "$(count "$WORK/other")" 0
sleep 0.05 && echo "# changed" >>"$p" && "$p" && "$p"
equal "changed" "$(count "$p")" 2
equal "its hash and template alone" "$(cut -d ' ' -f 3 "$LIST" | sort -u) $(awk '{ print $4 }' "$LIST" | sed 's/:.*//' | sort -u)" "$TEMPLATE $HASH"
equal "its policy" "$(rules)" "measure func=BPRM_CHECK fowner=$NUMBER"
equal "nobody else's" "$(tail -n +2 "$LIST" | grep -cv " $WORK/")" 0
: >"$WORK/done"
until [ -e "$END" ]; do sleep 0.2; done
finish
