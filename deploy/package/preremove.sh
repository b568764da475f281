#!/bin/sh
# deb: "remove", or "upgrade"; rpm: the number of installations that stay.
set -e
[ -d /run/systemd/system ] || exit 0
case "$1" in
remove | 0)
	systemctl disable --now walfleet.service || true
	;;
esac
