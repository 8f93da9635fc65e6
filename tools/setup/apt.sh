#!/usr/bin/env bash
# apt.sh PACKAGE...: install packages without questions and without what they merely recommend; what is there stays as it is.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get -q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update
apt-get -q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -y --no-install-recommends --no-upgrade install "$@"
