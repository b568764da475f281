package receivewal

// versionFormat begins as the original's does, for scripts that look for a major
// version in it, and goes on with what it really is.
const versionFormat = program + " (PostgreSQL) 17.0 (walfleet %s)\n"

const help = program + ` receives PostgreSQL streaming write-ahead logs.

Usage:
  ` + program + ` [OPTION]...

Options:
  -D, --directory=DIR    receive write-ahead log files into this directory
  -E, --endpos=LSN       exit after receiving the specified LSN
      --if-not-exists    do not error if slot already exists when creating a slot
  -n, --no-loop          do not loop on connection lost
      --no-sync          do not wait for changes to be written safely to disk
      --progress         show bytes, rate and time left on a terminal while catching up
  -s, --status-interval=SECS
                         time between status packets sent to server (default: 10)
  -S, --slot=SLOTNAME    replication slot to use
      --synchronous      flush write-ahead log immediately after writing
  -v, --verbose          output verbose messages; twice: those of walfleet's receiver too
  -V, --version          output version information, then exit
  -Z, --compress=METHOD[:DETAIL]
                         compress complete segments: gzip, lz4, zstd (walfleet's alone) or none
  -?, --help             show this help, then exit

Connection options:
  -d, --dbname=CONNSTR   connection string
  -h, --host=HOSTNAME    database server host or socket directory
  -p, --port=PORT        database server port number
  -U, --username=NAME    connect as specified database user
  -w, --no-password      never prompt for password
  -W, --password         force password prompt (should happen automatically)

Optional actions:
      --create-slot      create a new replication slot (for the slot's name see --slot)
      --drop-slot        drop the replication slot (for the slot's name see --slot)

This is walfleet's receiver behind the options of PostgreSQL's ` + program + `, and
takes over where that one stopped. The directory also gets .lock and archive.json,
which binds it to one cluster. The segment in progress is never compressed.
`
