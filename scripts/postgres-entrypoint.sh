#!/bin/bash
# The entrypoint of the images that images.sh builds: the contract of the official
# PostgreSQL image, as far as tests need it.
set -eo pipefail

case ${1:-} in
"" | -*) set -- postgres "$@" ;;
esac
case "$1 ${2:-}" in
"postgres --version" | "postgres -V" | "postgres --help" | "postgres -?") exec "$@" ;;
postgres\ *) ;;
*) exec "$@" ;;
esac

if [ "$(id -u)" = 0 ]; then
	install -d -o postgres -g postgres -m 3775 /var/run/postgresql
	mkdir -p "$PGDATA"
	chmod 700 "$PGDATA"
	find "$PGDATA" ! -user postgres -exec chown postgres:postgres {} +
	exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi

if [ -s "$PGDATA/PG_VERSION" ]; then
	exec "$@"
fi

export POSTGRES_USER=${POSTGRES_USER:-postgres}
export POSTGRES_DB=${POSTGRES_DB:-$POSTGRES_USER}

auth=$POSTGRES_HOST_AUTH_METHOD
password=()
if [ -n "$POSTGRES_PASSWORD" ]; then
	printf '%s\n' "$POSTGRES_PASSWORD" >/tmp/pwfile
	# shellcheck disable=SC2034 # the eval below uses it
	password=(--pwfile=/tmp/pwfile)
elif [ "$auth" != trust ]; then
	echo "Set POSTGRES_PASSWORD, or POSTGRES_HOST_AUTH_METHOD=trust." >&2
	exit 1
fi
eval 'initdb --username="$POSTGRES_USER" "${password[@]}" '"$POSTGRES_INITDB_ARGS"
rm -f /tmp/pwfile
echo "host all all all ${auth:-$(postgres -C password_encryption "${@:2}")}" >>"$PGDATA/pg_hba.conf"

# The temporary server listens on its Unix socket only.
server=("${@:2}" -c "listen_addresses=")
pg_ctl start --wait -o "$(printf '%q ' "${server[@]}")"
export PGPASSWORD=${PGPASSWORD:-$POSTGRES_PASSWORD}

query() {
	PGHOST='' PGHOSTADDR='' psql -v ON_ERROR_STOP=1 \
		--username="$POSTGRES_USER" --no-password --no-psqlrc "$@"
}

found=$(query -d postgres -At -v db="$POSTGRES_DB" <<<"SELECT 1 FROM pg_database WHERE datname = :'db'")
if [ -z "$found" ]; then
	query -d postgres -v db="$POSTGRES_DB" <<<'CREATE DATABASE :"db"'
fi

for file in /docker-entrypoint-initdb.d/*; do
	# shellcheck disable=SC1090
	case $file in
	*.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;
	*.sql) query -d "$POSTGRES_DB" -f "$file" ;;
	esac
done

pg_ctl stop --mode=fast --wait
unset PGPASSWORD
echo "PostgreSQL init process complete; ready for start up."
exec "$@"
