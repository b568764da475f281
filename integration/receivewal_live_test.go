package integration

import (
	"context"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"

	"github.com/walfleet/walfleet/internal/wal"
)

// process is a program that runs in a server's container, as the server's user.
type process struct {
	s              *server
	tool           tool
	slot, dir      string // what it archives from, and into
	pidFile        string
	stdout, stderr logBuffer
	terminal       io.Writer // what the user types, on a terminal; stdout then has what is shown there
	ended          chan struct{}
	status         int
	failure        error
}

// processes counts them, for the names of their files.
var processes atomic.Int64

// launch starts a program in a server's container: by its name in a tool's PATH, or by its path.
func (s *server) launch(t testing.TB, tool tool, terminal bool, env []string, argv ...string) *process {
	t.Helper()
	p := &process{s: s, tool: tool, ended: make(chan struct{}), pidFile: fmt.Sprintf("/tmp/process-%d.pid", processes.Add(1))}
	ctx, cancel := context.WithCancel(context.Background())
	engine, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const script = `echo $$ >"$0"; [ -z "$1" ] || PATH=$1:$PATH; shift; exec "$@"`
	exec, err := engine.ExecCreate(ctx, s.ctr.GetContainerID(), client.ExecCreateOptions{
		User: "postgres", Env: env, TTY: terminal, AttachStdin: terminal, AttachStdout: true, AttachStderr: true,
		Cmd: append([]string{"sh", "-c", script, p.pidFile, tool.path}, argv...),
	})
	if err != nil {
		t.Fatal(err)
	}
	attached, err := engine.ExecAttach(ctx, exec.ID, client.ExecAttachOptions{TTY: terminal})
	if err != nil {
		t.Fatal(err)
	}
	p.terminal = attached.Conn
	go func() {
		defer close(p.ended)
		defer engine.Close()
		defer attached.Close()
		if terminal {
			_, p.failure = io.Copy(&p.stdout, attached.Reader)
		} else {
			_, p.failure = stdcopy.StdCopy(&p.stdout, &p.stderr, attached.Reader)
		}
		for p.failure == nil {
			var state client.ExecInspectResult
			state, p.failure = engine.ExecInspect(ctx, exec.ID, client.ExecInspectOptions{})
			if p.status = state.ExitCode; !state.Running {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		select {
		case <-p.ended:
		default:
			p.try("KILL")
		}
		select {
		case <-p.ended:
		case <-time.After(10 * time.Second):
		}
		cancel()
		<-p.ended
		if t.Failed() {
			t.Logf("%s %s\nstatus %d\n%s%s", tool.name, strings.Join(argv, " "), p.status, &p.stdout, &p.stderr)
		}
	})
	return p
}

// archive starts pg_receivewal with a slot and a directory of its own.
func (s *server) archive(t testing.TB, tool tool, env []string, args ...string) *process {
	t.Helper()
	slot := fmt.Sprintf("live_%d_%s", processes.Add(1), tool.name)
	s.query(t, fmt.Sprintf("SELECT pg_copy_physical_replication_slot('base', '%s')", slot))
	dir := s.directory(t, slot)
	p := s.launch(t, tool, false, append([]string{"PGUSER=walfleet"}, env...),
		append([]string{"pg_receivewal", "-S", slot, "-D", dir}, args...)...)
	p.slot, p.dir = slot, dir
	return p
}

// directory makes a directory in the container that belongs to the server's user.
func (s *server) directory(t testing.TB, name string) string {
	t.Helper()
	dir := path.Join("/tmp/archives", name)
	s.shell(t, `install -d -o postgres -g postgres -m 700 /tmp/archives "$1"`, dir)
	return dir
}

func (p *process) try(signal string) error {
	code, out, err := p.s.ctr.Exec(context.Background(),
		[]string{"sh", "-c", `kill -s "$1" "$(cat "$0")"`, p.pidFile, signal}, tcexec.Multiplexed())
	if err == nil && code != 0 {
		text, _ := io.ReadAll(out)
		err = fmt.Errorf("kill: %s", text)
	}
	return err
}

// signal sends a signal, by its name without SIG.
func (p *process) signal(t testing.TB, name string) {
	t.Helper()
	if err := p.try(name); err != nil {
		t.Fatal(err)
	}
}

// wait waits for the process's end and returns its exit status.
func (p *process) wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("the process does not end: %s", &p.stderr)
	}
	if p.failure != nil {
		t.Fatal(p.failure)
	}
	return p.status
}

// awaitWritten waits until the server was told that everything before lsn has arrived.
func (p *process) awaitWritten(t testing.TB, lsn wal.LSN) {
	t.Helper()
	await(t, patience, fmt.Sprintf("write_lsn of slot %s at %s", p.slot, lsn), func() (bool, string) {
		select {
		case <-p.ended:
			t.Fatalf("the process has ended: %s", &p.stderr)
		default:
		}
		sender := p.s.sender(t, p.slot)
		return sender.write >= lsn, fmt.Sprintf("%+v", sender)
	})
}

var ownDirectory = regexp.MustCompile(`live_\d+_(original|ours)`)

// seen is what is compared of a process that has ended.
func (p *process) seen(t testing.TB) sighting {
	status := fmt.Sprint(p.wait(t))
	text := func(b *logBuffer) string {
		return ownDirectory.ReplaceAllString(comparable(strings.TrimRight(b.String(), "\n")), "live")
	}
	return sighting{status: status, stdout: text(&p.stdout), stderr: text(&p.stderr), files: p.s.files(t, p.dir)}
}

// files lists a directory as rows do.
func (s *server) files(t testing.TB, dir string) string {
	t.Helper()
	if dir == "" {
		return ""
	}
	return s.shell(t, `exec bash -c "$1" bash "$2"`, filesFunctions+`files "$1"`, dir)
}

// compareLive runs the original and ours at the same time, does the same with both, and compares what they leave.
func (s *server) compareLive(t *testing.T, env, args []string, then func(t *testing.T, both []*process), masks ...func(*sighting)) {
	t.Helper()
	both := []*process{s.archive(t, original, env, args...), s.archive(t, ours, env, args...)}
	then(t, both)
	theirs, mine := both[0].seen(t), both[1].seen(t)
	for _, mask := range masks {
		mask(&theirs)
		mask(&mine)
	}
	if diff := compareSightings(theirs, mine); diff != "" {
		t.Errorf("pg_receivewal %s\n%s", strings.Join(args, " "), diff)
	}
}

// awaitBoth waits until both tools of compareLive have everything that the server has.
func awaitBoth(t testing.TB, both []*process) {
	t.Helper()
	end := both[0].s.end(t)
	for _, p := range both {
		p.awaitWritten(t, end)
	}
}

// maskPartial takes out what a partial file has: the two tools did not stop at the same position.
func maskPartial(s *sighting) {
	s.files = partialSum.ReplaceAllString(s.files, "$1 -")
}

// TestReceivewalLive compares the original and ours while they run: on signals, when their connection or server goes
// away, and in what the server sees of them.
func TestReceivewalLive(t *testing.T) {
	for _, image := range []string{"postgres:17", "postgres:18"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := receivewalServer(t, serverOptions{image: image})
			s.write(t, 3)
			s.switchWAL(t)
			second := s.startSecond(t)
			t.Run("signals", s.testSignals)
			t.Run("disconnected", s.testDisconnected)
			t.Run("busy slot", s.testBusySlot)
			t.Run("terminal", s.testTerminal)
			t.Run("what the server sees", s.testSenders)
			t.Run("server stops", second.testStops)
		})
	}
}

func (s *server) testSignals(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		signal string
		args   []string
	}{
		{"INT", []string{"-n", "-v"}},
		{"TERM", []string{"-n", "-v"}},
		{"TERM", []string{"-v", "--synchronous"}},
		{"INT", []string{"-Z", "gzip"}},
		{"HUP", []string{"-n", "-v"}},
		{"KILL", []string{"-n", "-v"}},
	} {
		t.Run(fmt.Sprint(tt.signal, tt.args), func(t *testing.T) {
			t.Parallel()
			s.compareLive(t, nil, append(tt.args, "-s", "1"), func(t *testing.T, both []*process) {
				awaitBoth(t, both)
				for _, p := range both {
					p.signal(t, tt.signal)
				}
			}, maskPartial)
		})
	}
	t.Run("while waiting for the server", func(t *testing.T) {
		t.Parallel()
		s.compareLive(t, nil, []string{"-v", "-S", "unknown"}, func(t *testing.T, both []*process) {
			for _, p := range both {
				p.stderr.await(t, "disconnected; waiting 5 seconds to try again")
				p.signal(t, "TERM")
			}
		}, func(s *sighting) { s.stderr, _, _ = strings.Cut(s.stderr, "to try again") }) // what follows depends on time
	})
}

func (s *server) testDisconnected(t *testing.T) {
	t.Parallel()
	terminate := func(t *testing.T, both []*process) {
		awaitBoth(t, both)
		for _, p := range both {
			s.query(t, "SELECT pg_terminate_backend("+s.sender(t, p.slot).pid+")")
		}
	}
	t.Run("-n", func(t *testing.T) {
		t.Parallel()
		s.compareLive(t, nil, []string{"-n", "-v", "-s", "1"}, terminate, maskPartial)
	})
	t.Run("looping", func(t *testing.T) {
		t.Parallel()
		s.compareLive(t, nil, []string{"-v", "-s", "1"}, func(t *testing.T, both []*process) {
			terminate(t, both)
			for _, p := range both {
				p.stderr.await(t, "disconnected; waiting 5 seconds to try again")
			}
			awaitBoth(t, both)
			for _, p := range both {
				p.signal(t, "INT")
			}
		}, maskResumed)
	})
}

// testBusySlot has a slot that the original uses already.
func (s *server) testBusySlot(t *testing.T) {
	t.Parallel()
	first := s.archive(t, original, nil, "-n", "-s", "1")
	first.awaitWritten(t, s.end(t))
	s.compareLive(t, nil, []string{"-n", "-v", "-S", first.slot}, func(*testing.T, []*process) {})
	s.compareLive(t, nil, []string{"--drop-slot", "-S", first.slot}, func(*testing.T, []*process) {})
	first.signal(t, "INT")
	if status := first.wait(t); status != 0 {
		t.Errorf("exit status %d of the one that had the slot", status)
	}
}

// testTerminal types passwords.
func (s *server) testTerminal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		option, password string
		status           int
	}{
		{"-W", password, 0},
		{"--password", "wrong", 1},
		{"-n", password, 0}, // asks since it must
		{"-n", "wrong", 1},
	} {
		var seen [2]string
		for i, tool := range []tool{original, ours} {
			dir := s.directory(t, fmt.Sprintf("terminal_%d", processes.Add(1)))
			p := s.launch(t, tool, true, []string{"PGUSER=walfleet"},
				"pg_receivewal", "-n", "-E", "0/1", "-h", "127.0.0.1", "-D", dir, tt.option)
			p.stdout.await(t, "Password: ")
			if _, err := fmt.Fprintln(p.terminal, tt.password); err != nil {
				t.Fatal(err)
			}
			if status := p.wait(t); status != tt.status {
				t.Errorf("%s with the password %q: exit status %d", tool.name, tt.password, status)
			}
			seen[i] = p.stdout.String()
		}
		if seen[0] != seen[1] || strings.Contains(seen[1], tt.password) {
			t.Errorf("on the terminal of the original: %q; on that of ours: %q", seen[0], seen[1])
		}
	}
}

// testSenders compares what pg_stat_replication shows of the two, and has each of them as the synchronous standby that
// a commit waits for.
func (s *server) testSenders(t *testing.T) {
	const synchronous = "--synchronous"
	for _, tt := range []struct {
		name string
		env  []string
		args []string
	}{
		{"without a slot", nil, nil},
		{"with a slot", nil, []string{"-S"}},
		{"synchronous, without a slot", nil, []string{synchronous}},
		{"synchronous, with a slot", nil, []string{synchronous, "-S"}},
		{"application_name", nil, []string{synchronous, "-S", "-d", "application_name=mine"}},
		{"fallback_application_name", nil, []string{synchronous, "-S", "-d", "fallback_application_name=mine"}},
		{"PGAPPNAME", []string{"PGAPPNAME=mine"}, []string{"--no-sync"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var seen [2]string
			for i, tool := range []tool{original, ours} {
				name := fmt.Sprintf("sender_%d", processes.Add(1))
				var args []string
				for _, arg := range tt.args {
					if args = append(args, arg); arg == "-S" {
						s.query(t, "SELECT pg_copy_physical_replication_slot('base', '"+name+"')")
						args = append(args, name)
					}
				}
				p := s.launch(t, tool, false, append([]string{"PGUSER=walfleet"}, tt.env...),
					append([]string{"pg_receivewal", "-n", "-s", "1", "-D", s.directory(t, name)}, args...)...)
				s.awaitSender(t, `state = 'streaming' AND write_lsn >= '`+s.end(t).String()+`'`)
				isSynchronous := len(tt.args) > 0 && tt.args[0] == synchronous
				if isSynchronous {
					s.set(t, "synchronous_standby_names", "*")
					s.awaitSender(t, `sync_state = 'sync'`)
				}
				s.query(t, "CREATE TABLE "+name+" ()") // a commit, which waits
				s.awaitSender(t, `write_lsn >= '`+s.end(t).String()+`'`)
				if isSynchronous {
					s.awaitSender(t, `flush_lsn >= '`+s.end(t).String()+`'`)
				}
				seen[i] = fmt.Sprint(s.query(t, `SELECT usename, application_name, state, sync_state,
					flush_lsn IS NULL, replay_lsn IS NULL, reply_time IS NULL FROM pg_stat_replication`))
				if isSynchronous {
					s.set(t, "synchronous_standby_names", "")
				}
				p.signal(t, "INT")
				if status := p.wait(t); status != 0 {
					t.Errorf("%s: exit status %d", tool.name, status)
				}
				s.awaitNoSender(t)
			}
			if seen[0] != seen[1] {
				t.Errorf("pg_stat_replication shows of the original: %s; of ours: %s", seen[0], seen[1])
			}
		})
	}
}

// awaitSender waits until there is one walsender of which the condition holds, and awaitNoSender until there is none.
func (s *server) awaitSender(t testing.TB, condition string) {
	t.Helper()
	s.awaitSenders(t, condition, "1")
}

func (s *server) awaitNoSender(t testing.TB) {
	t.Helper()
	s.awaitSenders(t, "true", "0")
}

func (s *server) awaitSenders(t testing.TB, condition, count string) {
	t.Helper()
	await(t, patience, count+" walsenders: "+condition, func() (bool, string) {
		n := s.value(t, "SELECT count(*) FROM pg_stat_replication WHERE "+condition)
		return n == count, fmt.Sprint(s.query(t, "TABLE pg_stat_replication"))
	})
}

// second is another server in a server's container, on port 5433, whose data directory is readable by its group. It
// can be stopped while the container's other processes go on.
type second struct{ *server }

func (s *server) startSecond(t testing.TB) second {
	t.Helper()
	x := second{s}
	x.run(t, `initdb --allow-group-access --wal-segsize=1 --username=postgres --no-sync --auth=trust --pgdata=$data
		echo "port = 5433
			listen_addresses = ''
			wal_keep_size = 1GB
			autovacuum = off" >>$data/postgresql.conf`)
	x.start(t)
	x.sql(t, "CREATE ROLE walfleet LOGIN REPLICATION")
	return x
}

// run runs a script as the server's user.
func (x second) run(t testing.TB, script string) string {
	t.Helper()
	return x.shell(t, `exec setpriv --reuid=postgres --regid=postgres --init-groups sh -ec "$1"`, "data=/tmp/second; "+script)
}

func (x second) start(t testing.TB) {
	t.Helper()
	x.run(t, `pg_ctl --pgdata=$data --log=$data.log --wait start >/dev/null`)
}

func (x second) stop(t testing.TB, mode string) {
	t.Helper()
	x.run(t, `pg_ctl --pgdata=$data --wait --mode=`+mode+` stop >/dev/null`)
}

func (x second) sql(t testing.TB, sql string) string {
	t.Helper()
	return x.shell(t, `exec psql -XAtq -p 5433 -U postgres -d postgres -c "$1"`, sql)
}

// segment fills what is left of a segment, and a little of the next one.
func (x second) segment(t testing.TB) {
	t.Helper()
	x.sql(t, "SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
	x.sql(t, "SELECT pg_switch_wal()")
	x.sql(t, "SELECT pg_logical_emit_message(true, '', repeat('x', 50000))")
}

// both runs the original and ours without slots, waits until both have all that the second server has, does the
// same with both, and compares what they leave.
func (x second) both(t *testing.T, args []string, then func(both []*process)) {
	t.Helper()
	var both []*process
	for _, tool := range []tool{original, ours} {
		dir := x.directory(t, fmt.Sprintf("live_%d_%s", processes.Add(1), tool.name))
		p := x.launch(t, tool, false, []string{"PGUSER=walfleet", "PGPORT=5433", "PGHOST=/var/run/postgresql"},
			append([]string{"pg_receivewal", "-s", "1", "-D", dir}, args...)...)
		p.dir = dir
		both = append(both, p)
	}
	x.awaitWritten(t)
	then(both)
	theirs, mine := both[0].seen(t), both[1].seen(t)
	for _, s := range []*sighting{&theirs, &mine} {
		maskResumed(s)
	}
	if diff := compareSightings(theirs, mine); diff != "" {
		t.Errorf("pg_receivewal %s\n%s", strings.Join(args, " "), diff)
	}
}

func (x second) awaitWritten(t testing.TB) {
	t.Helper()
	await(t, patience, "both have everything", func() (bool, string) {
		seen := x.sql(t, `SELECT count(*) FROM pg_stat_replication WHERE write_lsn >=
			CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END`)
		return seen == "2", seen
	})
}

// testStops stops and starts the second server, and at last promotes it. Its data directory is readable by its group, and
// so are the archives' files.
func (x second) testStops(t *testing.T) {
	t.Parallel()
	t.Run("with -n", func(t *testing.T) {
		x.both(t, []string{"-n", "-v"}, func([]*process) {
			x.segment(t)
			x.awaitWritten(t)
			x.stop(t, "fast")
		})
	})
	x.start(t)
	t.Run("at once, with -n", func(t *testing.T) {
		x.both(t, []string{"-n", "-v"}, func([]*process) { x.stop(t, "immediate") })
	})
	x.start(t)
	t.Run("looping", func(t *testing.T) {
		x.both(t, []string{"-v"}, func(both []*process) {
			x.stop(t, "fast")
			for _, p := range both {
				p.stderr.await(t, "No such file or directory") // after a pause of five seconds
			}
			x.start(t)
			x.awaitWritten(t)
			x.segment(t)
			x.awaitWritten(t)
			for _, p := range both {
				p.signal(t, "TERM")
			}
		})
	})
	t.Run("promoted", func(t *testing.T) {
		x.stop(t, "fast")
		x.run(t, "touch $data/standby.signal")
		x.start(t)
		x.both(t, []string{"-v"}, func(both []*process) {
			x.sql(t, "SELECT pg_promote()")
			for _, p := range both {
				p.stderr.await(t, "switched to timeline 2 at")
			}
			x.segment(t)
			x.awaitWritten(t)
			for _, p := range both {
				p.signal(t, "TERM")
			}
		})
	})
}
