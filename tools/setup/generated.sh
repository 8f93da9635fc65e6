#!/usr/bin/env bash
# generated.sh: fail if the generated files are not what their sources give now. The compiler is pinned to Debian 12's:
# elsewhere this is left to CI, which sets IMANS_REQUIRE_VM and forbids leaving anything out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${IMANS_REQUIRE_VM:-}" ] && ! grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release; then
	echo "generated files not checked: they are made with Debian 12's clang-19"
	exit 0
fi
tools/setup/deps.sh generate
files=(internal/loader/{imans,protect}_{x86,arm64}_bpfel.{go,o} bpf/loss.h internal/event/loss.go docs/losses.md)
before=$(sha256sum "${files[@]}")
go run ./tools/bpf2go
if [ "$before" != "$(sha256sum "${files[@]}")" ]; then
	echo "generated files were not current (they are now); commit these:" >&2
	diff <(echo "$before") <(sha256sum "${files[@]}") | awk '/^>/ { print "  " $3 }' >&2
	exit 1
fi
