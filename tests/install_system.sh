#!/bin/sh
# What the SSH tests need: sshd and iproute2. Installed as root on Debian and Ubuntu; elsewhere the
# tests that need them are skipped, and say so.
set -eu
missing=""
[ -x /usr/sbin/sshd ] || command -v sshd >/dev/null || missing="$missing openssh-server"
command -v ip >/dev/null || missing="$missing iproute2"
command -v unshare >/dev/null || missing="$missing util-linux"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # The package must not start a server of its own on this machine.
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing
else
    echo "the SSH tests will be SKIPPED: missing$missing" >&2
    echo "fix: sudo apt-get install$missing, and run the tests as root" >&2
fi
