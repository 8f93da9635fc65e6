#!/usr/bin/env bash
# deps.sh NEED...: see to it that the tools of the named needs are there. Quick when they are. As root on Debian or Ubuntu
# it installs what is missing; otherwise it says what to install and fails. Needs: base go generate test race lint vm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# tools_of NEED: what the need takes, as "PROGRAM-OR-FILE:DEBIAN-PACKAGE". A leading ? marks what one can do without.
tools_of() {
	case $1 in
	base) echo make:make git:git /etc/ssl/certs/ca-certificates.crt:ca-certificates ;;
	go) ;; # go.sh sees to it
	generate) echo clang-19:clang-19 llvm-strip-19:llvm-19 /usr/include/bpf/bpf_helpers.h:libbpf-dev \
		/usr/include/linux/types.h:linux-libc-dev git:git ;;
	lint) echo git:git '?shellcheck:shellcheck' ;;
	test) echo swtpm:swtpm swtpm_setup:swtpm-tools tpm2_pcrread:tpm2-tools \
		evmctl:ima-evm-utils busybox:busybox-static runc:runc ;;
	race) echo gcc:gcc /usr/include/stdlib.h:libc6-dev ;;
	vm)
		echo qemu-system-x86_64:qemu-system-x86 swtpm:swtpm swtpm_setup:swtpm-tools mmdebstrap:mmdebstrap mke2fs:e2fsprogs \
			depmod:kmod xz:xz-utils zstd:zstd dpkg-deb:dpkg apt-get:apt tar:tar \
			/usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
		grep -qs '^ID=debian$' /etc/os-release || echo /usr/share/debootstrap/scripts/sid:debootstrap # names Debian's mirror
		[ "$(id -u)" = 0 ] || echo fakeroot:fakeroot
		;;
	*) echo "deps.sh: unknown need $1" >&2 && return 1 ;;
	esac
}

# present PROGRAM-OR-FILE
present() {
	case $1 in
	/*) [ -e "$1" ] ;;
	*) PATH=$PATH:/usr/sbin:/sbin type -P "$1" >/dev/null ;;
	esac
}

missing=() optional=()
for need in "$@"; do
	for entry in $(tools_of "$need"); do
		tool=${entry%%:*}
		present "${tool#\?}" && continue
		case $tool in
		\?*) optional+=("${entry##*:}") ;;
		*) missing+=("${entry##*:}") ;;
		esac
	done
done

if [ "$(id -u)" = 0 ] && type -P apt-get >/dev/null; then
	if [ $((${#missing[@]} + ${#optional[@]})) -gt 0 ]; then
		echo "installing: ${missing[*]} ${optional[*]}"
		tools/setup/apt.sh "${missing[@]}" "${optional[@]}"
	fi
elif [ ${#missing[@]} -gt 0 ]; then
	echo "missing packages; as root run: apt-get install ${missing[*]}" >&2
	exit 1
elif [ ${#optional[@]} -gt 0 ]; then
	echo "going on without: ${optional[*]}"
fi

case " $* " in
*" go "*) tools/setup/go.sh ;;
esac
