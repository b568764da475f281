package integration

import (
	"regexp"
	"strings"
)

// optionRows are the ways to call pg_receivewal whose outcome does not depend on time. The servers' own tools of
// versions before 17 print some messages differently; ours prints those of 17 always.
var optionRows = []row{
	// -D
	{"-D DIR", `receivewal -n -S $slot -E $middle -D $dir`, 0},
	{"-DDIR", `receivewal -n -S $slot -E $middle -D$dir`, 0},
	{"--directory=DIR", `receivewal -n -S $slot -E $middle --directory=$dir`, 17},
	{"--directory DIR", `receivewal -n -S $slot -E $middle --directory $dir`, 17},
	{"--dir=DIR", `receivewal -n -S $slot -E $middle --dir=$dir`, 17},
	{"-D DIR/", `receivewal -n -S $slot -E $middle -D $dir/`, 17},
	{"-nvDDIR", `receivewal -S $slot -E $middle -nvD$dir`, 0},
	{"-D twice", `receivewal -n -S $slot -E $middle -D /nowhere -D $dir`, 17},
	{"-D relative", `cd $dir/..; receivewal -n -S $slot -E $middle -D dir`, 17},
	{"-D does not exist", `receivewal -n -D $dir/none`, 0},
	{"-D empty", `receivewal -n -D ''`, 17},
	{"-D is a file", `touch $dir/file; receivewal -n -D $dir/file`, 17},
	{"-D not readable", `mkdir -m 300 $dir/../closed; receivewal -n -D $dir/../closed`, 17},
	{"-D not writable", `chmod 500 $dir; receivewal $open; chmod 700 $dir`, 17},
	{"no -D", `receivewal -n -S $slot`, 17},
	{"-D without its argument", `receivewal -n -D`, 17},
	{"--directory without its argument", `receivewal -n --directory`, 17},
	{"-nvD without its argument", `receivewal -nvD`, 17},
	{"foreign files in the directory", `touch $dir/000000010000000000000001.bak $dir/README $dir/00000001000000000000000a
		receivewal -v $open`, 17},

	// -E
	{"-E in the past", `receivewal -n -v -S $slot -E 0/1 -D $dir`, 0},
	{"-E where the slot begins", `receivewal -n -v -S $slot -E $start -D $dir`, 17},
	{"-E in a segment", `receivewal -n -v -S $slot -E $middle -D $dir`, 0},
	{"-E at a segment's end", `receivewal -n -v -S $slot -E $full -D $dir`, 0},
	{"-E before a segment's end", `receivewal -n -v -S $slot --endpos=$before -D $dir`, 17},
	{"-E with blanks", `receivewal -n -S $slot -E " 0/1" -D $dir`, 17},
	{"-E foo", `receivewal -n -E foo -D $dir`, 0},
	{"-E 0", `receivewal -n -E 0 -D $dir`, 17},
	{"-E empty", `receivewal -n -E '' -D $dir`, 17},
	{"-E 0/x", `receivewal -n -E 0/x -D $dir`, 17},
	{"-E /1", `receivewal -n -E /1 -D $dir`, 17},
	{"-E 1/", `receivewal -n -E 1/ -D $dir`, 17},
	{"-E without its argument", `receivewal -n -D $dir -E`, 17},
	{"already past -E", `receivewal -v $open; receivewal -v $open`, 0},
	{"goes on where it ended", `receivewal -n -v -S $slot -E $start -D $dir; receivewal -v $open`, 0},
	{"goes on without its slot", `receivewal -n -v -S $slot -E $before -D $dir; receivewal -nv -E $middle -D $dir`, 0},

	{"stops inside a long record, goes on", `receivewal -n -S $slot -E $inside -D $dir; receivewal -n -S $slot -E $after -D $dir`, 17},
	{"stops inside a long record, the original goes on", `receivewal -n -S $slot -E $inside -D $dir
		PATH=$usual receivewal -n -S $slot -E $after -D $dir`, 17},
	{"stops inside a long record, the original goes on behind it, then again", `receivewal -n -S $slot -E $inside -D $dir
		PATH=$usual receivewal -n -S $slot -E $after -D $dir; receivewal -n -S $slot -E $last -D $dir`, 17},
	{"stops inside a long record, the original goes on, then again", `receivewal -n -S $slot -E $inside -D $dir
		PATH=$usual receivewal -n -S $slot -E $inside -D $dir; receivewal -n -S $slot -E $after -D $dir`, 17},

	// -n, -v, --no-sync, --if-not-exists, --synchronous
	{"--no-loop --verbose", `receivewal --no-loop --verbose -S $slot -E $middle -D $dir`, 17},
	{"--no-l --verb", `receivewal --no-l --verb -S $slot -E $middle -D $dir`, 17},
	{"without -n", `receivewal -v -S $slot -E $middle -D $dir`, 0},
	{"--if-not-exists alone", `receivewal $open --if-not-exists`, 17},
	{"--no-sync", `receivewal $open --no-sync`, 0},
	{"--synchronous", `receivewal $open --synchronous`, 0},
	{"--synchronous --no-sync", `receivewal $open --synchronous --no-sync`, 17},
	{"--synchronous=yes", `receivewal $open --synchronous=yes`, 17},
	{"--verbose=1", `receivewal $open --verbose=1`, 17},

	// -s
	{"-s 0", `receivewal $open -s 0`, 0},
	{"-s 1", `receivewal $open -s 1`, 17},
	{"--status-interval=2147483", `receivewal $open --status-interval=2147483`, 17},
	{"-s 2147484", `receivewal $open -s 2147484`, 17},
	{"-s 99999999999", `receivewal $open -s 99999999999`, 17},
	{"-s -1", `receivewal $open -s -1`, 17},
	{"-s abc", `receivewal $open -s abc`, 17},
	{"-s 5s", `receivewal $open -s 5s`, 17},
	{"-s 1.5", `receivewal $open -s 1.5`, 17},
	{"-s 0x10", `receivewal $open -s 0x10`, 17},
	{"-s with blanks", `receivewal $open -s " 1 "`, 17},
	{"-s 010", `receivewal $open -s 010`, 17},
	{"-s +3", `receivewal $open -s +3`, 17},
	{"-s empty", `receivewal $open -s ''`, 17},

	// -S
	{"--slot=NAME", `receivewal -n -v --slot=$slot -E $middle -D $dir`, 17},
	{"-S unknown", `receivewal -n -v -S unknown -E $middle -D $dir`, 15},
	{"-S invalid", `receivewal -n -v -S 'Bad Name!' -E $middle -D $dir`, 15},
	{"-S with quotes", `receivewal -n -v -S 'a"b' -E $middle -D $dir`, 15},
	{"-S empty", `receivewal -n -v -S '' -E $middle -D $dir`, 15},
	{"no -S", `receivewal -n -v -E $middle -D $dir`, 0},
	{"a slot without WAL", `receivewal --create-slot -S fresh_$slot; receivewal -nv -S fresh_$slot -E $middle -D $dir`, 15},

	// -Z
	{"-Z 5", `receivewal $open -Z 5`, 0},
	{"-Z5", `receivewal $open -Z5`, 17},
	{"-Z 0", `receivewal $open -Z 0`, 0},
	{"-Z 9 -v", `receivewal $open -v -Z 9`, 17},
	{"-Z gzip", `receivewal $open -Z gzip`, 17},
	{"-Z gzip:5", `receivewal $open -Z gzip:5`, 15},
	{"--compress=gzip:level=5", `receivewal $open --compress=gzip:level=5`, 17},
	{"--compress=gzip:level=5,level=6", `receivewal $open --compress=gzip:level=5,level=6`, 17},
	{"-Z gzip:-1", `receivewal $open -Z gzip:-1`, 17},
	{"-Z -1", `receivewal $open -Z -1`, 17},
	{"-Z lz4", `receivewal $open -v -Z lz4`, 15},
	{"-Z lz4:3", `receivewal $open -Z lz4:3`, 17},
	{"-Z lz4:0", `receivewal $open -Z lz4:0`, 17},
	{"-Z none", `receivewal $open -Z none`, 15},
	{"-Z empty", `receivewal $open -Z ''`, 17},
	{"-Z twice", `receivewal $open -Z bogus -Z none`, 17},
	{"-Z none:1", `receivewal $open -Z none:1`, 17},
	{"-Z none:", `receivewal $open -Z none:`, 17},
	{"-Z gzip:", `receivewal $open -Z gzip:`, 17},
	{"-Z gzip:5,", `receivewal $open -Z gzip:5,`, 17},
	{"-Z bogus", `receivewal $open -Z bogus`, 17},
	{"-Z GZIP", `receivewal $open -Z GZIP`, 17},
	{"-Z server-gzip", `receivewal $open -Z server-gzip`, 17},
	{"-Z gzip:bogus", `receivewal $open -Z gzip:bogus`, 17},
	{"-Z gzip:level=bogus", `receivewal $open -Z gzip:level=bogus`, 17},
	{"-Z gzip:workers=2", `receivewal $open -Z gzip:workers=2`, 17},
	{"-Z gzip:long", `receivewal $open -Z gzip:long`, 17},
	{"-Z 99", `receivewal $open -Z 99`, 17},
	{"-Z gzip:99", `receivewal $open -Z gzip:99`, 17},
	{"-Z gzip:0", `receivewal $open -Z gzip:0`, 17},
	{"-Z -2", `receivewal $open -Z -2`, 17},
	{"-Z lz4:13", `receivewal $open -Z lz4:13`, 17},
	{"-Z lz4:bogus", `receivewal $open -Z lz4:bogus`, 17},
	{"-Z 5x", `receivewal $open -Z 5x`, 17},
	{"-Z 1:1", `receivewal $open -Z 1:1`, 17},
	{"-Z :5", `receivewal $open -Z :5`, 17},
	{"-Z changes", `receivewal -n -S $slot -E $full -D $dir -Z gzip; receivewal -n -v -S $slot -E $inside -D $dir`, 17},
	{"-Z begins", `receivewal -n -S $slot -E $start -D $dir; receivewal -v $open -Z 1`, 17},

	// connections
	{"-d keywords", `receivewal $open -d 'user=walfleet application_name=x'`, 0},
	{"-d over TCP", `receivewal $open -d "host=127.0.0.1 password=$secret dbname=any replication=database"`, 17},
	{"-d URI", `receivewal $open -d "postgresql://walfleet:$secret@127.0.0.1:5432/any?sslmode=disable"`, 0},
	{"-d URI of the socket", `receivewal $open --dbname='postgres://walfleet@%2Fvar%2Frun%2Fpostgresql/'`, 17},
	{"-d is overridden", `receivewal $open -d 'host=/nowhere port=1 user=nobody replication=false' -h $PGHOST -p 5432 -U walfleet`, 17},
	{"-d without keywords", `receivewal $open -d postgres`, 17},
	{"-d with an unknown keyword", `receivewal $open -d nonsense=1`, 17},
	{"-d with a bad URI", `receivewal $open -d postgres://%zz`, 17},
	{"-d with a bad quote", `receivewal $open -d "user='walfleet"`, 17},
	{"-h socket directory", `unset PGHOST; receivewal $open -h /var/run/postgresql`, 0},
	{"--host=socket directory", `unset PGHOST; receivewal $open --host=/var/run/postgresql --port=5432 --username=walfleet`, 17},
	{"no host", `unset PGHOST; receivewal $open`, 17},
	{"-h 127.0.0.1", `PGPASSWORD=$secret receivewal $open -h 127.0.0.1`, 0},
	{"-h localhost", `PGPASSWORD=$secret receivewal $open -h localhost`, 17},
	{"-h without a socket", `receivewal $open -h /nowhere`, 17},
	{"-h without a socket, looping", `receivewal -S $slot -D $dir -h /nowhere`, 17},
	{"-h does not resolve", `receivewal $open -h no.such.host.invalid`, 17},
	{"-p without a server", `receivewal $open -h 127.0.0.1 -p 1`, 15},
	{"-p without a server at all of a host's addresses", `receivewal $open -h localhost -p 1`, 17},
	{"-p without a socket", `receivewal $open -p 1`, 17},
	{"-h many", `receivewal $open -h 127.0.0.1,/nowhere -p 1,2`, 17},
	{"-h many, one answers", `receivewal $open -h /nowhere,/var/run/postgresql -p 5432`, 17},
	{"-p abc", `receivewal $open -p abc`, 17},
	{"-p 0", `receivewal $open -p 0`, 17},
	{"-p 65536", `receivewal $open -p 65536`, 17},
	{"-p -1", `receivewal $open -p -1`, 17},
	{"-p empty", `receivewal $open -p ''`, 17},
	{"-U unknown", `receivewal $open -U nobody`, 15},
	{"-U not allowed", `receivewal $open -U limited`, 17},
	{"-U not allowed, over TCP", `PGPASSWORD=$secret receivewal $open -U limited -h 127.0.0.1`, 17},
	{"-w, password needed", `receivewal $open -w -h 127.0.0.1`, 15},
	{"--no-password, password needed", `receivewal $open --no-password -h 127.0.0.1`, 17},
	{"-w, password known", `PGPASSWORD=$secret receivewal $open -w -h 127.0.0.1`, 17},
	{"-w, password not needed", `receivewal $open -w`, 17},
	{"wrong password", `PGPASSWORD=wrong receivewal $open -h 127.0.0.1`, 17},
	{"PGPASSFILE", `echo "127.0.0.1:*:*:walfleet:$secret" >$dir/../pass; chmod 600 $dir/../pass
		PGPASSFILE=$dir/../pass receivewal $open -w -h 127.0.0.1`, 0},
	{"PGPASSFILE readable for others", `echo "127.0.0.1:*:*:walfleet:$secret" >$dir/../pass; chmod 644 $dir/../pass
		PGPASSFILE=$dir/../pass receivewal $open -w -h 127.0.0.1`, 17},
	{"PGPASSFILE with a wrong password", `echo "127.0.0.1:*:*:walfleet:wrong" >$dir/../pass; chmod 600 $dir/../pass
		PGPASSFILE=$dir/../pass receivewal $open -w -h 127.0.0.1`, 17},
	{"PGHOST, PGPORT, PGUSER, PGPASSWORD, PGSSLMODE", `export PGHOST=127.0.0.1 PGPORT=5432 PGSSLMODE=disable PGPASSWORD=$secret
		receivewal $open`, 0},
	{"PGHOST, PGPORT without a server", `PGHOST=/nowhere PGPORT=7 receivewal $open`, 17},
	{"no PGUSER", `unset PGUSER; receivewal $open`, 17},
	{"PGSERVICEFILE", `printf '[archive]\nhost=/var/run/postgresql\nuser=walfleet\n' >$dir/../services; unset PGHOST PGUSER
		PGSERVICEFILE=$dir/../services PGSERVICE=archive receivewal $open`, 17},
	{"PGSERVICEFILE missing", `PGSERVICEFILE=/nowhere PGSERVICE=archive receivewal $open`, 17},
	{"unknown service", `: >$dir/../services; PGSERVICEFILE=$dir/../services receivewal $open -d service=archive`, 17},
	{"PGOPTIONS", `PGOPTIONS='-c work_mem=1MB' receivewal $open`, 17},
	{"PGOPTIONS refused", `PGPASSWORD=$secret PGOPTIONS='-c bogus=1' receivewal $open -d sslmode=disable -h 127.0.0.1`, 17},
	{"PGSSLMODE bogus", `PGSSLMODE=bogus receivewal $open -h 127.0.0.1`, 17},
	{"PGCONNECT_TIMEOUT bogus", `PGCONNECT_TIMEOUT=bogus receivewal $open -h 127.0.0.1`, 17},
	{"sslmode=require of a server without", `receivewal $open -h 127.0.0.1 -d "sslmode=require password=$secret"`, 17},
	{"sslmode=require over the socket", `receivewal $open -d sslmode=require`, 17},
	{"target_session_attrs=read-write", `receivewal $open -d target_session_attrs=read-write`, 17},
	{"target_session_attrs=standby", `receivewal $open -d target_session_attrs=standby`, 17},
	{"keepalives", `receivewal $open -h 127.0.0.1 -d "password=$secret keepalives=1 keepalives_idle=10 tcp_user_timeout=1000"`, 17},

	// slots
	{"--create-slot", `receivewal --create-slot -S new_$slot; receivewal --create-slot -S new_$slot -v`, 15},
	{"--create-slot -v", `receivewal --create-slot -v --slot=new_$slot`, 0},
	{"--create-slot --if-not-exists", `receivewal --create-slot -S $slot --if-not-exists`, 0},
	{"--create-slot --if-not-exists, new", `receivewal --create-slot -S new_$slot --if-not-exists -v -D /nowhere`, 17},
	{"--create", `receivewal --create -S new_$slot`, 17},
	{"--create-slot of an invalid name", `receivewal --create-slot --if-not-exists -S 'Bad Name'`, 17},
	{"--create-slot without --slot", `receivewal --create-slot`, 17},
	{"--create-slot --drop-slot", `receivewal --create-slot --drop-slot -S new_$slot`, 17},
	{"--create-slot --drop-slot without --slot", `receivewal --create-slot --drop-slot`, 17},
	{"--create-slot=NAME", `receivewal --create-slot=new_$slot`, 17},
	{"--create-slot without a server", `receivewal --create-slot -S new_$slot -h /nowhere`, 17},
	{"--create-slot with wrong options", `receivewal --create-slot -S new_$slot -Z bogus`, 17},
	{"--drop-slot", `receivewal --drop-slot -S $slot; receivewal --drop-slot -v -S $slot`, 15},
	{"--drop-slot -v", `receivewal --drop-slot -v --slot=$slot`, 0},
	{"--drop-slot --if-not-exists", `receivewal --drop-slot -S $slot; receivewal --drop-slot -S $slot --if-not-exists`, 17},
	{"--drop-slot of an invalid name", `receivewal --drop-slot -S 'Bad Name'`, 17},
	{"--drop-slot without --slot", `receivewal --drop-slot`, 17},

	// usage
	{"no options", `receivewal`, 17},
	{"--foo", `receivewal --foo`, 17},
	{"-x", `receivewal -x`, 17},
	{"-nvx", `receivewal -nvx -D $dir`, 17},
	{"--no", `receivewal --no`, 17},
	{"--s", `receivewal --s`, 17},
	{"--d", `receivewal --d=$dir`, 17},
	{"--=x", `receivewal --=x`, 17},
	{"-S without its argument", `receivewal -S`, 17},
	{"--slot without its argument", `receivewal --slot`, 17},
	{"arguments", `receivewal -D $dir extra more`, 17},
	{"arguments before options", `receivewal extra -D $dir more --no-loop`, 17},
	{"--", `receivewal -D $dir -- -n`, 17},
	{"an empty argument", `receivewal ''`, 17},
	{"-", `receivewal -`, 17},
	{"called by its path", `mkdir $dir/../bin; ln -s "$(command -v pg_receivewal)" $dir/../bin/pg_receivewal
		timeout 40 $dir/../bin/pg_receivewal --foo >$dir/../stdout 2>$dir/../stderr; echo $? >$dir/../status`, 17},

	{"-D . in it", `cd $dir; receivewal -n -S $slot -E $middle -D .`, 17},

	// modes
	{"umask 000", `umask 000; receivewal $open`, 17},
	{"umask 277", `umask 277; receivewal $open`, 17},
}

// A difference is one that ours is allowed: what the mask takes out of both sightings of a row is not compared.
type difference struct {
	why  string
	mask func(*sighting)
}

var differences = map[string]difference{
	"stops inside a long record, goes on":                                    {resumed + "; " + untruthful, func(s *sighting) { maskResumed(s); maskSealed(s) }},
	"stops inside a long record, the original goes on":                       {untruthful, maskSealedNames},
	"stops inside a long record, the original goes on behind it, then again": {untruthful, maskSealedNames},
	"stops inside a long record, the original goes on, then again":           {untruthful, maskSealedNames},
	"already past -E":                  {resumed, maskResumed},
	"goes on where it ended":           {resumed, maskResumed},
	"-E before a segment's end":        {untruthful, maskSealed},
	"goes on without its slot":         {resumed + "; " + untruthful, func(s *sighting) { maskResumed(s); maskSealed(s) }},
	"-Z changes":                       {resumed + "; " + untruthful + "; the original leaves its partial file beside a sealed one", func(s *sighting) { maskStale(s); maskResumed(s); maskSealed(s) }},
	"-S empty":                         {"ours sends no empty name", func(s *sighting) { s.stderr, _, _ = strings.Cut(s.stderr, "\n") }},
	"called by its path":               {"ours is called by its name", func(s *sighting) { s.stderr = strings.TrimPrefix(s.stderr, "/tmp/rows/dir/../bin/") }},
	"PGPASSFILE with a wrong password": {"libpq says where it was", func(s *sighting) { s.stderr, _, _ = strings.Cut(s.stderr, "\n") }},
	"-Z begins":                        {"the original leaves the plain partial file of a segment beside the compressed one", maskStale},
	"-D not writable":                  {inOtherWords, maskError},
	"-d without keywords":              {inOtherWords, maskError},
	"-d with an unknown keyword":       {inOtherWords, maskError},
	"-d with a bad URI":                {inOtherWords, maskError},
	"-d with a bad quote":              {inOtherWords, maskError},
	"PGSERVICEFILE missing":            {inOtherWords, maskError},
	"unknown service":                  {inOtherWords, maskError},
	"PGSSLMODE bogus":                  {inOtherWords, maskError},
	"PGCONNECT_TIMEOUT bogus":          {inOtherWords, maskError},
	"target_session_attrs=standby":     {inOtherWords, maskError},
	"PGOPTIONS refused":                {"libpq tries twice, and says so twice", maskRepeated},
	"--=x":                             {"ours has one option more", func(s *sighting) { s.stderr = strings.ReplaceAll(s.stderr, " '--progress'", "") }},
}

const (
	resumed      = "ours goes on in the middle of a segment, the original at its start, and where a message ends depends on that"
	untruthful   = "ours seals a segment when the record that crosses its end is complete"
	inOtherWords = "the same error in other words"
)

var (
	streamingAt = regexp.MustCompile(`(starting|stopped) log streaming at [0-9A-F]+/[0-9A-F]+`)
	partialSum  = regexp.MustCompile(`(?m)^(\S+\.partial .*) \S+$`)
	notRenaming = regexp.MustCompile(`(?m)^pg_receivewal: not renaming .*\n?`)
	finished    = regexp.MustCompile(`(?m)^pg_receivewal: finished segment at .*\n?`)
	firstError  = regexp.MustCompile(`(?s)pg_receivewal: error: .+`)
)

// maskResumed takes out where streaming began and ended, and what a partial file has.
func maskResumed(s *sighting) {
	s.stderr = streamingAt.ReplaceAllString(s.stderr, "$1 log streaming")
	s.files = partialSum.ReplaceAllString(s.files, "$1 -")
}

// maskSealed takes out when segments were sealed, and whether.
func maskSealed(s *sighting) {
	s.stderr = finished.ReplaceAllString(notRenaming.ReplaceAllString(s.stderr, ""), "")
	s.files = strings.ReplaceAll(s.files, ".partial ", " ")
}

// maskSealedNames takes out when segments were sealed, but not whether.
func maskSealedNames(s *sighting) {
	maskResumed(s)
	s.stderr = finished.ReplaceAllString(notRenaming.ReplaceAllString(s.stderr, ""), "")
}

// endsInside are rows that end inside a record that crosses a segment's end: the original has sealed that segment and
// begun the next one, ours has it as its last and partial one.
var endsInside = map[string]bool{
	"stops inside a long record, the original goes on behind it, then again": true,
	"-Z changes": true,
}

// withoutCrossing is what the original has, as ours has it.
func withoutCrossing(files string) string {
	lines := strings.Split(strings.TrimSuffix(files, "\n"), "\n")
	if len(lines) < 2 {
		return files
	}
	fields := strings.Fields(lines[len(lines)-2])
	fields[0], fields[len(fields)-1] = fields[0]+".partial", "-"
	return strings.Join(append(lines[:len(lines)-2], strings.Join(fields, " ")), "\n") + strings.Repeat("\n", len(files)-len(strings.TrimSuffix(files, "\n")))
}

// maskStale takes out the partial files of sealed segments.
func maskStale(s *sighting) {
	var kept []string
	sealed := map[string]bool{}
	for _, line := range strings.Split(s.files, "\n") {
		name, _, _ := strings.Cut(line, " ")
		segment, suffix, _ := strings.Cut(name, ".")
		if suffix != "partial" {
			sealed[segment] = true
		}
		if suffix != "partial" || !sealed[segment] {
			kept = append(kept, line)
		}
	}
	s.files = strings.Join(kept, "\n")
}

// maskError takes out what an error says.
func maskError(s *sighting) {
	s.stderr = firstError.ReplaceAllString(s.stderr, "pg_receivewal: error: …")
}

// maskRepeated takes out the repetition of a line, whatever it begins with.
func maskRepeated(s *sighting) {
	first, _, _ := strings.Cut(s.stderr, "\n")
	s.stderr = first
}
