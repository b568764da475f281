#!/bin/sh
# Before the files come, some of which are walfleet's: the user. It is never removed, because
# the archives belong to it.
set -e
if ! getent group walfleet >/dev/null; then
	groupadd --system walfleet
fi
if ! getent passwd walfleet >/dev/null; then
	useradd --system --gid walfleet --home-dir /var/lib/walfleet --no-create-home \
		--shell /usr/sbin/nologin --comment "walfleet, WAL archive" walfleet
fi
