#!/bin/bash
# Runs the fuzz targets of this module, one after the other.
#   fuzz.sh TIME TARGETS [blind]
# TIME is how long each runs, as go test -fuzztime takes it, TARGETS a regular expression. With blind inputs are not chosen by what code they
# reach: then nothing, the dependencies included, is compiled anew to tell that. An input that fails is left in the package's
# testdata/fuzz, from where go test takes it from then on; what else is worth keeping stays in go's cache for the next run.
set -Eeuo pipefail
time=$1 targets=$2
build=(-fuzz=.)
[ "${3-}" != blind ] || build=()
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cache=$(go env GOCACHE)/fuzz
count=0 failed=()
while read -r folder; do
	package=$(go list "./$folder")
	go test -c "${build[@]}" -o "$work/fuzz.test" "./$folder"
	while read -r target; do
		[[ $target =~ ^Fuzz && $target =~ $targets ]] || continue
		count=$((count + 1))
		if ! (cd "$folder" && "$work/fuzz.test" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" -test.fuzzcachedir "$cache/$package") \
			>"$work/said" 2>&1 </dev/null; then
			failed+=("$folder $target")
			tail -n 60 "$work/said"
		fi
		echo "$folder $target: $(grep '^fuzz: elapsed' "$work/said" | tail -n 1 | cut -d ' ' -f 3-)"
	done < <("$work/fuzz.test" -test.list '^Fuzz')
done < <(git ls-files --cached --others --exclude-standard '*_test.go' | xargs grep -l '^func Fuzz' | xargs -n 1 dirname | sort -u)
if [ ${#failed[@]} -gt 0 ]; then
	printf 'failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
[ "$count" -gt 0 ] || { echo "fuzz.sh: no target matches $targets" >&2 && exit 2; }
