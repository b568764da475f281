#!/bin/sh
# A new installation has no cluster yet and is not started; one that runs takes the new
# binary. deb: "configure" and the version before, if any; rpm: the number of installations.
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
case "$1 $2" in
"configure " | "1 ")
	echo "walfleet: add your clusters to /etc/walfleet/walfleet.toml, then: systemctl enable --now walfleet"
	;;
*)
	systemctl try-restart walfleet.service || echo "walfleet: not restarted, see: systemctl status walfleet" >&2
	;;
esac
