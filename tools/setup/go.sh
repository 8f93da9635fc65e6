#!/usr/bin/env bash
# go.sh: see to it that a Go of at least go.mod's version is there. One that is on PATH is taken as it is; otherwise the
# toolchain module of that very version is fetched, as newer go commands do by themselves, with whatever Go there is
# (Debian's, if need be), kept in the cache and linked from .tools/bin, which the Makefile has first in its PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
want=$(awk '$1 == "go" { print $2; exit }' go.mod)

# new_enough GO: whether the program is a Go of the wanted version or a later one.
new_enough() {
	local version
	version=$(cd / && GOTOOLCHAIN=local GOFLAGS='' "$1" env GOVERSION 2>/dev/null) || return 1
	version=${version#go}
	[ "$(printf '%s\n' "$want" "${version%% *}" | sort -V | head -n 1)" = "$want" ]
}

# use GOROOT: link its commands from .tools/bin.
use() {
	mkdir -p .tools/bin
	ln -sfn "$1/bin/go" .tools/bin/go
	ln -sfn "$1/bin/gofmt" .tools/bin/gofmt
}

if go=$(type -P go) && new_enough "$go"; then exit 0; fi
for root in /usr/local/go /usr/lib/go-*; do
	if [ -x "$root/bin/go" ] && new_enough "$root/bin/go"; then use "$root" && exit 0; fi
done

cache=${XDG_CACHE_HOME:-${HOME:?set HOME or XDG_CACHE_HOME}/.cache}/imans-go
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ ! -x "$cache/go$want/bin/go" ]; then
	if ! type -P go >/dev/null; then
		if [ "$(id -u)" != 0 ] || ! type -P apt-get >/dev/null; then
			echo "no Go: install Go $want or later, or any Go, which will fetch it" >&2
			exit 1
		fi
		echo "installing: golang-go, to fetch Go $want with"
		tools/setup/apt.sh golang-go
	fi
	echo "fetching Go $want ($(go version | cut -d ' ' -f 3) is too old)"
	fetch=$cache/fetch
	[ ! -e "$fetch" ] || chmod -R u+w "$fetch"
	rm -rf "$fetch"
	mkdir -p "$fetch/module"
	case $(uname -m) in
	x86_64) arch=amd64 ;;
	aarch64) arch=arm64 ;;
	*) echo "no Go toolchain is known for $(uname -m): install Go $want" >&2 && exit 1 ;;
	esac
	printf 'module fetch\n' >"$fetch/module/go.mod"
	(cd "$fetch/module" &&
		GOTOOLCHAIN=local GOFLAGS=-mod=mod GOMODCACHE=$fetch/cache go mod download -json \
			"golang.org/toolchain@v0.0.1-go$want.linux-$arch" >"$fetch/answer") || {
		cat "$fetch/answer" >&2
		exit 1
	}
	root=$(awk -F '"' '$2 == "Dir" { print $4 }' "$fetch/answer")
	# Module archives keep neither write nor execute permission.
	chmod -R u+w "$fetch/cache"
	chmod -R a+x "$root/bin" "$root/pkg/tool"
	mv "$root" "$cache/go$want"
	rm -rf "$fetch"
fi
use "$cache/go$want"
