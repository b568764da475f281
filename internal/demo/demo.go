// Package demo is what "walfleet demo" runs: the whole main job in half a
// minute, on two throwaway primaries that it starts itself, one with segments
// of 16 MB and one with segments of 1 GB, as PolarDB has.
//
// It archives both with a real fleet while they write, kills one with SIGKILL
// and starts it again, and in the end compares every archived segment with the
// server's own, byte for byte. What it finds is its result: nil means that
// each byte was there.
//
// The servers are child processes where PostgreSQL is installed, Docker
// containers where it is not. They listen on 127.0.0.1 alone, want a random
// password, and are gone at the end, whatever the end was.
package demo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/postgres"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// Options say how the demo runs. Only Out is needed.
type Options struct {
	Out     io.Writer // the story; a table in it moves when this is a terminal
	Dir     string    // where the demo makes its own directory; empty: TMPDIR, or /var/tmp if that has more space
	Image   string    // run the servers in containers of this image; empty: WALFLEET_DEMO_IMAGE, then see the package
	Keep    bool      // leave the directory: archive, configuration, log and (of processes) the servers' data
	Verbose bool      // show the fleet's log, and no moving table
}

// Bounds of the single steps. On a slow disk each takes seconds at most.
const (
	totalTimeout = 5 * time.Minute // pulling an image not included
	stepTimeout  = time.Minute
	stopTimeout  = 15 * time.Second
)

// Run tells and plays the story. It returns an error if a byte of the archive
// differs or is missing, if a cluster did not recover after the kill, and if
// the demo could not be played. When ctx is done it stops and cleans up.
func Run(ctx context.Context, o Options) error {
	ctx, stop := untilHangup(ctx)
	defer stop()
	ctx, cancelCause := context.WithCancelCause(ctx)
	defer cancelCause(nil)
	d := &demo{options: o, screen: newScreen(o.Out, o.Verbose, cancelCause)}
	err := d.choose(ctx)
	if ctx.Err() != nil {
		return interruption(ctx)
	}
	if err != nil {
		return err
	}
	if err := d.makeDir(); err != nil {
		return err
	}
	limited, cancel := context.WithTimeoutCause(ctx, totalTimeout, fmt.Errorf("not done after %s", totalTimeout))
	defer cancel()
	err = d.play(limited)
	interrupted := err != nil && ctx.Err() != nil
	if interrupted {
		d.screen.say("\nInterrupted. Cleaning up ...")
		err = interruption(ctx)
	}
	return errors.Join(err, d.cleanUp(err != nil && !interrupted))
}

func interruption(ctx context.Context) error {
	return fmt.Errorf("interrupted: %w", context.Cause(ctx))
}

// programs are what an installation must have beside the server: what creates
// one, and the client that drives it.
var programs = []string{"initdb", "psql"}

type demo struct {
	options Options
	screen  *screen

	// Where the servers come from: bin and owner, or an image.
	bin   postgres.Installation
	owner *postgres.Owner
	image image

	dir      string
	password string
	clusters []*cluster // the 16 MB one, then the 1 GB one
	fleet    *running   // nil until started
}

// cluster is one primary and what is known of its WAL.
type cluster struct {
	primary
	server
	load     *load
	expected expected
}

// choose finds PostgreSQL or an image.
func (d *demo) choose(ctx context.Context) (err error) {
	image := cmp.Or(d.options.Image, os.Getenv("WALFLEET_DEMO_IMAGE"))
	if image == "" {
		if bin, ok := postgres.Find(ctx, postgres.OldestMajor, programs...); ok {
			d.bin = bin
			d.owner, err = postgres.ServerOwner()
			return err
		}
	}
	name, err := findImage(ctx, image)
	if err != nil {
		return err
	}
	if !imagePresent(ctx, name) {
		d.screen.say("Pulling the container image %s ...", name)
		if _, err := docker(ctx, nil, "pull", "--quiet", name); err != nil {
			return err
		}
	}
	d.image, err = inspectImage(ctx, name)
	return err
}

// Space that the demo takes at its peak, with some reserve. In 1 GB segments:
// one of the server's and one sealed, and the next .partial, allocated at its
// full size; the server's next one is sparse.
const (
	archiveSpace = 2500 << 20
	serverSpace  = 1800 << 20
)

// makeDir makes the demo's directory where there is space for it.
func (d *demo) makeDir() error {
	parents := []string{os.TempDir(), "/var/tmp"}
	if d.options.Dir != "" {
		parents = []string{d.options.Dir}
	}
	need := int64(archiveSpace)
	if d.image.name == "" {
		need += serverSpace
	}
	var errs []error
	for _, parent := range parents {
		err := d.makeDirIn(parent, need)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("the demo needs %s of disk for a minute: %w", size(need), errors.Join(errs...))
}

func (d *demo) makeDirIn(parent string, need int64) error {
	parent, err := filepath.Abs(parent)
	if err != nil {
		return err
	}
	free, err := postgres.FreeSpace(parent)
	switch {
	case err != nil:
		return err
	case free < need:
		return fmt.Errorf("%s has %s free", parent, size(free))
	case d.owner != nil && !passable(parent):
		return fmt.Errorf("user %s, as whom the servers run because PostgreSQL refuses root, cannot get into %s", d.owner.Name, parent)
	}
	dir, err := os.MkdirTemp(parent, "walfleet-demo-")
	if err != nil {
		return err
	}
	if d.owner != nil { // who goes through to a directory of its own
		if err := os.Chmod(dir, 0o711); err != nil {
			return errors.Join(err, os.Remove(dir))
		}
	}
	d.dir = dir
	return nil
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// play is the story.
func (d *demo) play(ctx context.Context) error {
	begin := time.Now()
	d.screen.say(`walfleet demo: archive two PostgreSQL primaries while they write, kill one with SIGKILL on the way, and
compare the archive with the servers' own WAL. Half a minute; all of it is in %s.
`, d.dir)
	for _, step := range []func(context.Context) error{d.startServers, d.startFleet, d.write, d.crash, d.finish, d.stop} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.verify(ctx, begin)
}

func (d *demo) startServers(ctx context.Context) error {
	from := fmt.Sprintf("with PostgreSQL %s in containers of %s", d.image.version, d.image.name)
	if d.image.name == "" {
		from = fmt.Sprintf("with PostgreSQL %s from %s", d.bin.Version, d.bin.Dir)
		if d.owner != nil {
			from += fmt.Sprintf(", as user %s because it refuses root", d.owner.Name)
		}
	}
	d.screen.say("1. Start two primaries %s.", from)

	d.password = newPassword()
	var taken []int
	for _, p := range []primary{{name: "pg-16mb", size: 16 << 20}, {name: "pg-1gb", size: 1 << 30}} {
		port, err := postgres.FreePort(taken...)
		if err != nil {
			return err
		}
		taken = append(taken, port)
		p.port, p.password, p.dir = port, d.password, d.path(p.name)
		if err := os.Mkdir(p.dir, 0o700); err != nil {
			return err
		}
		c := &cluster{primary: p}
		if d.image.name == "" {
			c.server = newProcess(p, d.bin, d.owner)
		} else {
			c.server = newContainer(p, d.image, filepath.Base(d.dir))
		}
		d.clusters = append(d.clusters, c)
	}
	// Different loads: many commits, whose latency shows; and much WAL, with
	// records that the kill tears.
	d.clusters[0].load = &load{server: d.clusters[0].server, sql: transaction(64, 64), every: 15 * time.Millisecond}
	d.clusters[1].load = &load{server: d.clusters[1].server, sql: transaction(64, 1024), every: 50 * time.Millisecond}

	group, ctx := errgroup.WithContext(ctx)
	for _, c := range d.clusters {
		group.Go(func() error { return c.prepare(ctx) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, c := range d.clusters {
		d.screen.say("   %-8s 127.0.0.1:%d, WAL in segments of %s", c.name, c.port, size(int64(c.size)))
	}
	return nil
}

// prepare starts the server and creates what load and fleet need.
func (c *cluster) prepare(ctx context.Context) error {
	if err := c.start(ctx); err != nil {
		return err
	}
	return c.ask(ctx, func(ctx context.Context, db *session) (err error) {
		if _, err = db.query(ctx, "CREATE ROLE walfleet LOGIN REPLICATION PASSWORD '"+c.password+"'"); err != nil {
			return err
		}
		if _, err = db.query(ctx, createTable); err != nil {
			return err
		}
		c.expected.size = c.size
		c.expected.first, err = db.lsn(ctx, "SELECT pg_current_wal_flush_lsn()")
		return err
	})
}

// ask runs f on a connection of its own, within a step's time.
func (c *cluster) ask(ctx context.Context, f func(ctx context.Context, db *session) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, stepTimeout, fmt.Errorf("no answer within %s", stepTimeout))
	defer cancel()
	err := once(ctx, c.server, func(db *session) error { return f(ctx, db) })
	if err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

// running is a fleet at work, and what moves the table.
type running struct {
	*fleet.Fleet
	stop     context.CancelFunc
	done     chan struct{} // closed when Run has returned
	err      error         // what Run returned
	patience time.Duration // how long stopping may take
	writes   chan struct{} // closed to end the loads
	loads    errgroup.Group
	table    chan struct{} // closed when the table stands still
	log      *os.File
}

func (d *demo) startFleet(ctx context.Context) error {
	config := d.configuration()
	d.screen.say("\n2. Archive both. This is the whole configuration (%s):\n", d.path("walfleet.toml"))
	for line := range strings.Lines(config) {
		d.screen.say("%s", strings.TrimRight(indent+line, "\n "))
	}
	files := []struct{ name, content string }{{"walfleet.toml", config}, {"password", d.password + "\n"}}
	for _, f := range files {
		if err := os.WriteFile(d.path(f.name), []byte(f.content), 0o600); err != nil {
			return err
		}
	}
	if err := os.Mkdir(d.path("archive"), 0o700); err != nil {
		return err
	}
	cfg, err := fleet.Load(d.path("walfleet.toml"))
	if err != nil {
		return err
	}
	for i, c := range d.clusters {
		c.expected.dir = cfg.Clusters[i].Dir
	}
	log, err := os.OpenFile(d.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	var w io.Writer = log
	if d.options.Verbose {
		w = io.MultiWriter(log, d.screen)
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &running{
		Fleet: fleet.New(cfg, slog.New(slog.NewTextHandler(w, nil))),
		stop:  cancel,
		done:  make(chan struct{}), writes: make(chan struct{}), table: make(chan struct{}),
		log:      log,
		patience: cfg.ShutdownTimeout + stopTimeout,
	}
	d.fleet = r
	go func() {
		defer close(r.done)
		r.err = r.Run(ctx)
	}()
	d.screen.say("\n   FLUSHED is what walfleet has synced to disk and acknowledged, LAG what the server has beyond that.\n")
	go func() {
		defer close(r.table)
		shown := ""
		tick := time.NewTicker(redrawInterval)
		defer tick.Stop()
		for {
			select {
			case <-r.done:
				return
			case <-tick.C:
				states := fmt.Sprint(d.states())
				d.screen.show(d.table(), states != shown)
				shown = states
			}
		}
	}()
	err = d.await(ctx, "both clusters to stream", func() (bool, error) {
		return !slices.ContainsFunc(d.states(), func(s receiver.State) bool { return s != receiver.Streaming }), nil
	})
	if err != nil {
		return err
	}
	return d.makeSynchronous(ctx, d.clusters[0])
}

func (d *demo) logFile() string { return d.path("walfleet.log") }

// configuration is what an operator would write.
func (d *demo) configuration() string {
	var b strings.Builder
	fmt.Fprintf(&b, "archive_dir = %q\n\n[http]\nlisten = \"127.0.0.1:0\"\n", d.path("archive"))
	for _, c := range d.clusters {
		fmt.Fprintf(&b, "\n[[cluster]]\nname          = %q\n", c.name)
		fmt.Fprintf(&b, "conninfo      = \"host=127.0.0.1 port=%d user=walfleet dbname=postgres sslmode=disable\"\n", c.port)
		fmt.Fprintf(&b, "password_file = %q\n", d.path("password"))
	}
	return b.String()
}

// makeSynchronous lets the commits of c wait for walfleet.
func (d *demo) makeSynchronous(ctx context.Context, c *cluster) error {
	return c.ask(ctx, func(ctx context.Context, db *session) error {
		for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = 'walfleet'", "SELECT pg_reload_conf()"} {
			if _, err := db.query(ctx, sql); err != nil {
				return err
			}
		}
		return d.await(ctx, "walfleet to be a synchronous standby", func() (bool, error) {
			rows, err := db.query(ctx, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")
			return len(rows) == 1, err
		})
	})
}

// table is the fleet's status and how commits fare.
func (d *demo) table() []string {
	lines := statusTable(d.fleet.Status())
	c := d.clusters[0]
	if l := c.load.latencies(); l.commits > 0 {
		lines = append(lines, latencyLine(c.name, l))
	}
	return lines
}

// await polls until reached is true. It fails when the time is up, and at once
// when the fleet has ended or one of its receivers needs a person.
func (d *demo) await(ctx context.Context, what string, reached func() (bool, error)) error {
	begin := time.Now()
	for {
		ok, err := reached()
		if ok || err != nil {
			return err
		}
		if slices.Contains(d.states(), receiver.Halted) || time.Since(begin) > stepTimeout {
			var reasons []string
			for _, s := range d.fleet.Status() {
				reasons = append(reasons, fmt.Sprintf("%s is %s (%s)", s.Name, s.State, s.Reason))
			}
			return fmt.Errorf("waited %s for %s; %s", time.Since(begin).Round(time.Second), what, strings.Join(reasons, "; "))
		}
		select {
		case <-d.fleet.done:
			return fmt.Errorf("waiting for %s, the fleet ended: %v", what, d.fleet.err)
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// write lets the servers write, and shows what they say of walfleet.
func (d *demo) write(ctx context.Context) error {
	d.screen.say("3. Let both write. Their WAL is archived as it is written, not when a segment is full: of a primary that is lost\n"+
		"   now, LAG is lost at most, and no commit of %s, which has synchronous_standby_names = 'walfleet'.\n", d.clusters[0].name)
	for _, c := range d.clusters {
		d.fleet.loads.Go(func() error {
			c.load.run(ctx, d.fleet.writes)
			return nil
		})
	}
	if err := d.pause(ctx, 3*time.Second); err != nil {
		return err
	}
	var lines []string
	for _, c := range d.clusters {
		err := c.ask(ctx, func(ctx context.Context, db *session) error {
			rows, err := db.query(ctx, "SELECT format('%s %s, sent %s, written %s, flushed %s, %s', "+
				"application_name, state, sent_lsn, write_lsn, flush_lsn, sync_state) FROM pg_stat_replication")
			for _, row := range rows {
				lines = append(lines, fmt.Sprintf("%s%-8s %s", indent, c.name, row))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	d.screen.say("   What the servers say of it (pg_stat_replication):\n\n%s\n", strings.Join(lines, "\n"))
	return d.pause(ctx, 2*time.Second)
}

// pause lets time pass, unless the fleet ends.
func (d *demo) pause(ctx context.Context, t time.Duration) error {
	end := time.Now().Add(t)
	return d.await(ctx, "WAL", func() (bool, error) { return !time.Now().Before(end), nil })
}

// crash kills the 1 GB primary in the middle of a segment and starts it again.
func (d *demo) crash(ctx context.Context) error {
	other, c := d.clusters[0], d.clusters[1]
	before := other.load.latencies().commits
	d.screen.say("4. Kill %s: SIGKILL to all of its processes. %s must not notice.\n", c.name, other.name)
	if err := c.kill(ctx); err != nil {
		return err
	}
	if err := d.pause(ctx, 1500*time.Millisecond); err != nil {
		return err
	}
	begin := time.Now()
	if err := c.start(ctx); err != nil {
		return err
	}
	var end wal.LSN
	err := c.ask(ctx, func(ctx context.Context, db *session) (err error) {
		end, err = db.lsn(ctx, "SELECT pg_current_wal_flush_lsn()")
		return err
	})
	if err != nil {
		return err
	}
	err = d.await(ctx, c.name+" to stream again", func() (bool, error) {
		s := d.status(c)
		return s.State == receiver.Streaming && s.Flushed >= end, nil
	})
	if err != nil {
		return err
	}
	d.screen.say("   %s is archived to its end again %.1f s after it was told to start, with its crash recovery.\n"+
		"   Meanwhile %s committed %d transactions.\n",
		c.name, time.Since(begin).Seconds(), other.name, other.load.latencies().commits-before)
	return d.pause(ctx, 3*time.Second)
}

// states are those of the receivers.
func (d *demo) states() []receiver.State {
	var states []receiver.State
	for _, s := range d.fleet.Status() {
		states = append(states, s.State)
	}
	return states
}

func (d *demo) status(c *cluster) fleet.ClusterStatus {
	for _, s := range d.fleet.Status() {
		if s.Name == c.name {
			return s
		}
	}
	return fleet.ClusterStatus{}
}

// finish ends the loads and completes the segment that each server is in.
func (d *demo) finish(ctx context.Context) error {
	d.screen.say("5. Stop writing, switch to the next segment (pg_switch_wal), and wait until the full ones are sealed: synced,\n" +
		"   then renamed to their final names.\n")
	close(d.fleet.writes)
	_ = d.fleet.loads.Wait() // loads have no error
	for _, c := range d.clusters {
		err := c.ask(ctx, func(ctx context.Context, db *session) error {
			// Something on both sides of the switch, which does nothing at a segment's start.
			const message = "SELECT FROM pg_logical_emit_message(true, 'walfleet demo', 'switch')"
			if _, err := db.query(ctx, message); err != nil {
				return err
			}
			end, err := db.lsn(ctx, "SELECT pg_switch_wal()") // within the segment that it ends
			if err != nil {
				return err
			}
			if _, err := db.query(ctx, message); err != nil {
				return err
			}
			c.expected.sealed = c.size.Segment(1, end-1).End()
			c.expected.flushed, err = db.lsn(ctx, "SELECT pg_current_wal_flush_lsn()")
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, c := range d.clusters {
		last := filepath.Join(c.expected.dir, c.size.Segment(1, c.expected.sealed-1).Name())
		err := d.await(ctx, "segment "+last, func() (bool, error) {
			_, err := os.Stat(last)
			if errors.Is(err, os.ErrNotExist) {
				return false, nil
			}
			return d.status(c).Flushed >= c.expected.flushed, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// stop ends the fleet, then the servers.
func (d *demo) stop(ctx context.Context) error {
	if err := d.stopFleet(); err != nil {
		return err
	}
	for _, c := range d.clusters {
		// What came after finish looked, such as a checkpoint.
		c.expected.flushed = max(c.expected.flushed, d.status(c).Flushed)
	}
	d.screen.settle(d.table())
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	for _, c := range d.clusters {
		if err := c.server.stop(ctx); err != nil {
			return err
		}
	}
	return nil
}

// stopFleet ends the fleet, if it still runs, and returns its error.
func (d *demo) stopFleet() error {
	r := d.fleet
	r.stop()
	select {
	case <-r.done:
		<-r.table
		return r.err
	case <-time.After(r.patience):
		return fmt.Errorf("the fleet has not stopped within %s", r.patience)
	}
}

// verify compares, and gives the verdict.
func (d *demo) verify(ctx context.Context, begin time.Time) error {
	d.screen.say("\n6. Compare every archived segment with the server's own in pg_wal, byte for byte.\n")
	var all compared
	var errs []error
	for _, c := range d.clusters {
		got, err := compare(ctx, c.expected, c.server)
		if err != nil {
			errs = append(errs, fmt.Errorf("the archive of %s is not the server's pg_wal: %w", c.name, err))
			continue
		}
		d.screen.say("%s%-8s %d segments (%d sealed), %s", indent, c.name, got.segments, got.sealed, size(got.bytes))
		all.segments += got.segments
		all.bytes += got.bytes
	}
	if errs != nil {
		return errors.Join(errs...)
	}
	d.screen.say("\nOK: %d segments of %d clusters (%s) are byte-identical to the servers' own pg_wal, through one SIGKILL (%.0f s).",
		all.segments, len(d.clusters), size(all.bytes), time.Since(begin).Seconds())
	d.screen.say(`
Next: write your own clusters into a copy of config.example.toml, then  walfleet run -c walfleet.toml
      On each server: a role with REPLICATION, and a line in pg_hba.conf that lets it in for replication.`)
	return nil
}

// cleanUp ends everything that still runs. The directory stays if asked for,
// or if the demo failed: it holds the evidence.
func (d *demo) cleanUp(failed bool) error {
	var errs []error
	for _, c := range d.clusters {
		errs = append(errs, c.server.remove())
	}
	if r := d.fleet; r != nil {
		_ = d.stopFleet() // its error is known already
		_ = r.loads.Wait()
		errs = append(errs, r.log.Close())
	}
	switch {
	case failed:
		if lines := lastLines(d.logFile(), 15); lines != "" {
			d.screen.say("\nThe log of walfleet ends with:\n%s", lines)
		}
		d.screen.say("\nFAILED. Nothing runs any more; %s is left to look at. Remove it with: rm -r %[1]s", d.dir)
	case d.options.Keep:
		d.screen.say("\nKept: %s (archive, walfleet.toml, walfleet.log)", d.dir)
	default:
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}

// lastLines returns the last n lines of a file, or nothing where it cannot be
// read.
func lastLines(file string, n int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
