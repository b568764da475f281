# What walfleet asks of a server; run once, when the data directory is made.
psql -v ON_ERROR_STOP=1 -U postgres -v password="$(cat /run/secrets/walfleet_password)" <<'SQL'
CREATE ROLE walfleet LOGIN REPLICATION PASSWORD :'password';
SQL
echo "host replication walfleet samenet scram-sha-256" >>"$PGDATA/pg_hba.conf"
