#!/bin/sh
# One namespace of many at the same time, with a HASH, a TEMPLATE and a policy of its own, for files of the user NUMBER. It begins
# when nobody has the pipe START open for writing any more, and stays, once it is done, until nobody has END: many that look every now
# and then would be all that the machine does.
. "${0%/*}/lib.sh"

now=$WORK/now
# look: puts the list as it is now into the file now. Where all begin at once the agent may not be done in time; a read says so, and is
# tried again, later each time.
look() {
	pause=1
	until cat "$LIST" >"$now" 2>/dev/null; do sleep "$pause" && pause=$((pause * 2)); done
}

echo "$HASH" >"$IMA/hash" && echo "$TEMPLATE" >"$IMA/template_name"
active_with "measure func=BPRM_CHECK fowner=$NUMBER"
p=$WORK/p
program "$p" && chown "$NUMBER" "$p"
program "$WORK/other" && chown "$((NUMBER + 1))" "$WORK/other"
exec 3<"$START" 4<"$END"
: >"$WORK/ready"
read -r _ <&3 || :
"$p" && "$p" && "$WORK/other" && look
equal "its own, once" "$(count "$p" "$now")" 1
equal "what only its neighbour wants" "$(count "$WORK/other" "$now")" 0
sleep 0.05 && echo "# changed" >>"$p" && "$p" && "$p" && look
equal "changed" "$(count "$p" "$now")" 2
equal "its hash and template alone" "$(awk '{ sub(":.*", "", $4); print $3, $4 }' "$now" | sort -u)" "$TEMPLATE $HASH"
equal "its policy" "$(rules)" "measure func=BPRM_CHECK fowner=$NUMBER"
equal "nobody else's" "$(tail -n +2 "$now" | grep -cv " $WORK/")" 0
: >"$WORK/done"
read -r _ <&4 || :
finish
