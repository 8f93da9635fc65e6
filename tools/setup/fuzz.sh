#!/bin/bash
# Runs the fuzz targets of this module, one after the other.
#   fuzz.sh TIME TARGETS [own]
# TIME is how long each runs, as go test -fuzztime takes it, TARGETS a regular expression. Inputs are chosen by what code they reach; with own
# by what code of this module: then no dependency is compiled anew to tell that, and a target that is not done within minutes fails. An input
# that fails is left in the package's testdata/fuzz, from where go test takes it from then on; what else is worth keeping stays in go's cache
# for the next run.
set -Eeuo pipefail
time=$1 targets=$2 own=${3-}
work=$(mktemp -d) memory=/dev/shm
[ -w "$memory" ] || memory=$work
trap 'rm -rf "$work"' EXIT
cache=$(go env GOCACHE)/fuzz

declare -A found=() # targets by folder
while IFS=: read -r file target; do
	if [[ $target =~ $targets ]]; then found[${file%/*}]+="$target "; fi
done < <(git ls-files --cached --others --exclude-standard '*_test.go' | xargs grep -Eo '^func Fuzz\w+' | sed 's/:func /:/')
[ ${#found[@]} -gt 0 ] || { echo "fuzz.sh: no target matches $targets" >&2 && exit 2; }
mapfile -t folders < <(printf '%s\n' "${!found[@]}" | sort)

run=()
if [ "$own" = own ]; then
	go test -c -gcflags="$(go list -m)/...=-d=libfuzzer" -o "$work/" "${folders[@]/#/./}"
	run=(timeout 5m)
fi
failed=()
for folder in "${folders[@]}"; do
	package=$(go list "./$folder") program=$work/${folder##*/}.test
	[ "$own" = own ] || go test -c -fuzz=. -o "$program" "./$folder"
	for target in ${found[$folder]}; do
		if ! (cd "$folder" && TMPDIR=$memory "${run[@]}" "$program" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" \
			-test.fuzzminimizetime 100x -test.fuzzcachedir "$cache/$package") >"$work/said" 2>&1 </dev/null; then
			failed+=("$folder $target")
			tail -n 60 "$work/said"
		fi
		echo "$folder $target: $(grep '^fuzz: elapsed' "$work/said" | tail -n 1 | cut -d ' ' -f 3-)"
	done
	rm "$program"
done
if [ ${#failed[@]} -gt 0 ]; then
	printf 'failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
