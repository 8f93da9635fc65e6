#!/usr/bin/env bash
# generated.sh: fail if the committed generated files are not what their sources give now.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
files=(internal/loader/imans_x86_bpfel.go internal/loader/imans_x86_bpfel.o internal/loader/imans_arm64_bpfel.go
	internal/loader/imans_arm64_bpfel.o bpf/loss.h internal/event/loss.go docs/losses.md)
before=$(sha256sum "${files[@]}")
go run ./tools/bpf2go
if [ "$before" != "$(sha256sum "${files[@]}")" ]; then
	echo "generated files were not current (they are now); commit these:" >&2
	diff <(echo "$before") <(sha256sum "${files[@]}") | awk '/^>/ { print "  " $3 }' >&2
	exit 1
fi
