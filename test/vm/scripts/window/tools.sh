#!/bin/sh
# What people type, and evmctl.
. "${0%/*}/lib.sh"

active_with "measure func=BPRM_CHECK"
for i in 1 2 3 4 5 6; do run "$WORK/p$i"; done
binary=$IMA/binary_runtime_measurements

holds "grep" grep -q "$WORK/p3" "$LIST"
equal "cat | wc -l" "$(cat "$LIST" | wc -l)" "$(cat "$IMA/runtime_measurements_count")"
equal "head" "$(head -n 1 "$LIST" | cut -d ' ' -f 5)" boot_aggregate
equal "tail" "$(tail -n 1 "$LIST" | cut -d ' ' -f 5)" "$WORK/p6"
equal "awk" "$(awk '$5 == "'"$WORK/p2"'" { print $3 }' "$LIST")" "$(cat "$IMA/template_name")"
equal "sort | uniq" "$(sort "$LIST" | uniq -d)" ""
equal "dd in small pieces" "$(dd if="$LIST" bs=7 2>/dev/null | sha256sum)" "$(sha256sum <"$LIST")"
equal "dd with an offset" "$(dd if="$LIST" bs=1 skip=3 count=40 2>/dev/null)" "$(head -n 1 "$LIST" | cut -c 4-43)"
cp "$LIST" "$WORK/copy" && equal "cp" "$(cat "$WORK/copy")" "$(cat "$LIST")"
equal "wc -c" "$(wc -c <"$binary")" "$(cat "$binary" | wc -c)"
equal "the other folder" "$(cat "${IMA%/ima}/integrity/ima/ascii_runtime_measurements")" "$(cat "$LIST")"
for bank in sha1 sha256 sha384 sha512; do
	equal "as many entries for $bank" "$(wc -l <"${LIST}_$bank")" "$(wc -l <"$LIST")"
done
timeout 20 tail -n 0 -f "$LIST" >"$WORK/followed" &
tail=$!
sleep 1 && run "$WORK/followed-program"
i=0
until grep -q "followed-program" "$WORK/followed" || [ $i = 100 ]; do i=$((i + 1)) && sleep 0.1; done
kill $tail
holds "tail -f" grep -q "followed-program" "$WORK/followed"

# values BANK: what the PCR must hold, by replaying the list, as evmctl reads it.
values() {
	zero=$(printf "%0$(($("$1sum" </dev/null | cut -d ' ' -f 1 | tr -d '\n' | wc -c)))d" 0)
	value=$zero
	while read -r _ digest _; do
		[ "$digest" != "$zero" ] || digest=$(echo "$zero" | tr 0 f)
		value=$(printf '%s%s' "$value" "$digest" | xxd -r -p | "$1sum" | cut -d ' ' -f 1)
	done <"${LIST}_$1"
	for n in 00 01 02 03 04 05 06 07 08 09; do echo "PCR-$n: $zero"; done
	echo "PCR-10: $value"
	for n in 11 12 13 14 15 16 17 18 19 20 21 22 23; do echo "PCR-$n: $zero"; done
}
if type evmctl >/dev/null 2>&1; then
	values sha1 >pcrs.sha1 && values sha256 >pcrs.sha256
	cp "${PCRS_SHA256:-pcrs.sha256}" given.sha256
	holds "evmctl ima_measurement" evmctl ima_measurement --ignore-violations --pcrs sha1,pcrs.sha1 --pcrs sha256,given.sha256 "$binary"
	sed 's/^PCR-10: ./PCR-10: x/' pcrs.sha1 | tr x "$(sed -n 's/^PCR-10: \(.\).*/\1/p' pcrs.sha1 | tr 0-9a-f 1-9a-f0)" >wrong
	refused "evmctl and a wrong PCR" "" evmctl ima_measurement --ignore-violations --pcrs sha1,wrong "$binary"
else
	skip "evmctl ima_measurement" "there is no evmctl"
fi
finish
