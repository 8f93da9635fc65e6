# shellcheck shell=sh
# What the scripts of this folder have in common; they source it.
IMA=${IMA:-/sys/kernel/security/ima}
LIST=$IMA/ascii_runtime_measurements
LIB=${LIB:-$(cd "${0%/*}" && pwd)/lib.sh}
WORK=${WORK:-$(mktemp -d /tmp/ima.XXXXXX)}
export IMA LIB WORK
checks=0 failed=0
cd "$WORK" || exit 1

ok() { checks=$((checks + 1)) && echo "ok $1"; }
not_ok() { checks=$((checks + 1)) failed=1 && echo "not ok $1: $2"; }
skip() { ok "$1 # skip $2"; }
finish() { echo "1..$checks" && exit "$failed"; }

# equal NAME GOT WANT
equal() { if [ "$2" = "$3" ]; then ok "$1"; else not_ok "$1" "got '$2', want '$3'"; fi; }

# holds NAME COMMAND…: the command succeeds.
holds() {
	what=$1 && shift
	if out=$("$@" 2>&1); then ok "$what"; else not_ok "$what" "$* failed: $out"; fi
}

# refused NAME TEXT COMMAND…: the command fails, and what it says has the text in it.
refused() {
	what=$1 text=$2 && shift 2
	if out=$("$@" 2>&1); then
		not_ok "$what" "$* succeeded"
	elif echo "$out" | grep -qi "$text"; then
		ok "$what"
	else
		not_ok "$what" "$* said '$out', want '$text'"
	fi
}

# write FILE TEXT: one write of one line.
write() { sh -c 'echo "$2" >"$1"' sh "$1" "$2"; }

activate() { echo 1 >"$IMA/active"; }

# active_with RULE…: makes this an active namespace with these rules.
active_with() {
	activate && for rule; do echo "$rule"; done >"$IMA/policy"
}

# program FILE [TEXT]: makes a program that nobody has seen before.
program() {
	printf '#!/bin/sh\n# %s %s\n' "$1" "${2:-$(cat /proc/sys/kernel/random/uuid)}" >"$1" && chmod 755 "$1"
}

# run FILE [TEXT]: makes a program and runs it.
run() { program "$@" && "$1"; }

# count NAME [LIST]: how many entries have this name, a regular expression. With some templates more comes behind it.
count() { awk -v name="^$1\$" '$5 ~ name { n++ } END { print n + 0 }' "${2:-$LIST}"; }

# rules: the policy, without the blanks at the ends of lines.
rules() { sed 's/ *$//' "$IMA/policy"; }

# ids: how many user ids there are here.
ids() { awk '{ n += $3 } END { printf "%.0f\n", n }' /proc/self/uid_map; }

# as_other COMMAND: runs a line of shell as user 1000.
as_other() { su -s /bin/sh other -c "$1"; }
