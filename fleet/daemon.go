package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Daemon is a fleet that follows its configuration file. Make it with NewDaemon,
// run it once with Run. All else any goroutine may call.
type Daemon struct {
	*Fleet
	// Reloading is called when a reload begins, and what it returns when that has
	// ended; nil: nothing is. It is set before Run.
	Reloading func() (done func())
	// Follow is told of each [http] section before the fleet follows the rest of its file;
	// when it fails the reload is refused, and what was before goes on. nil: nobody is
	// told. It is set before Run.
	Follow func(HTTPConfig) error

	file    string // absolute
	version string
	log     *slog.Logger
	level   *slog.LevelVar
	began   time.Time
	start   Config // what it was started with

	reloading sync.Mutex // held by a reload, from reading the file to its outcome

	mu      sync.Mutex
	last    *Outcome
	applied time.Time // when the file was applied last, without an error
}

// Outcome is what became of one reload.
type Outcome struct {
	Time    time.Time `json:"time"`    // when it ended
	Seconds float64   `json:"seconds"` // how long it took
	File    string    `json:"file"`
	// Error says why nothing was changed, or, when Applied, why not everything was.
	Error   string   `json:"error,omitempty"`
	Applied bool     `json:"applied"`     // the file was valid, and became the configuration
	Plan    Plan     `json:"done"`        // what was done with each cluster
	Stuck   []string `json:"not_stopped"` // clusters that were told to stop and have not in time; what replaces them starts when they have
	Notes   []string `json:"notes"`       // what of the file counts from the next start on alone
}

// NewDaemon makes a daemon that does nothing yet. cfg is what file says; level is the
// level of log.
func NewDaemon(file string, cfg *Config, log *slog.Logger, level *slog.LevelVar, version string) (*Daemon, error) {
	file, err := filepath.Abs(file)
	if err != nil {
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	d := &Daemon{Fleet: New(cfg, log), file: file, version: version, log: log, level: level, began: time.Now(), applied: time.Now(), start: *cfg}
	d.setLevel(cfg)
	return d, nil
}

func (d *Daemon) setLevel(cfg *Config) {
	_ = d.level.UnmarshalText([]byte(cfg.Log.Level)) // validated with the file
}

// Reload reads the whole file again and makes the fleet follow it; when anything in
// the file is wrong nothing changes. It is the one way to do so, whoever asks, and one
// reload comes after the other. ctx is the daemon's: what has begun goes on when
// whoever asked has gone. expected is the file that is meant, and has to be the
// daemon's; "" is that one.
func (d *Daemon) Reload(ctx context.Context, expected string) Outcome {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	if d.Reloading != nil {
		defer d.Reloading()()
	}
	began := time.Now()
	out := Outcome{File: d.file}
	if !sameFile(expected, d.file) {
		out.finish(began, fmt.Errorf("this walfleet runs with %s, not with %s; nothing changed", d.file, expected))
		return out // and is no news of the daemon's own file
	}
	cfg, err := Load(d.file)
	if err == nil {
		err = d.canFollow(cfg)
	}
	if err == nil && d.Follow != nil {
		select {
		case <-d.Started():
			err = d.Follow(cfg.HTTP)
		default: // Reload says that nothing runs yet, and nothing is to have changed then
		}
	}
	if err == nil {
		out.Plan, err = d.Fleet.Reload(ctx, cfg)
		out.Applied = !errors.Is(err, ErrNotRunning)
	}
	if out.Applied {
		d.setLevel(cfg)
		out.Notes = d.notes(cfg)
	}
	var stuck *StuckError
	if errors.As(err, &stuck) {
		out.Stuck = stuck.Names
	}
	out.finish(began, err)
	d.logReload(out)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = &out
	if out.Error == "" {
		d.applied = out.Time
	}
	return out
}

// Preview is what a reload would do if the daemon's file had this content, and does
// nothing of it: the outcome is not Applied. file is the content's name, for errors.
func (d *Daemon) Preview(file string, content []byte) Outcome {
	began := time.Now()
	out := Outcome{File: file}
	cfg, err := Parse(file, content)
	if err == nil {
		err = d.canFollow(cfg)
	}
	if err == nil {
		out.Plan, out.Notes = d.Fleet.Plan(cfg), d.notes(cfg)
	}
	out.finish(began, err)
	return out
}

// sameFile tells whether expected is file, or nothing is expected.
func sameFile(expected, file string) bool {
	if expected == "" || expected == file {
		return true
	}
	a, err1 := os.Stat(expected)
	b, err2 := os.Stat(file)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// finish fills in what is the same for every outcome. Lists are never nil, so that
// each has its place in JSON.
func (o *Outcome) finish(began time.Time, err error) {
	o.Time = time.Now()
	o.Seconds = o.Time.Sub(began).Seconds()
	if err != nil {
		o.Error = err.Error()
	}
	for _, names := range append(o.Plan.lists(), &o.Stuck, &o.Notes) {
		if *names == nil {
			*names = []string{}
		}
	}
	if o.Plan.Changed == nil {
		o.Plan.Changed = map[string][]string{}
	}
}

// canFollow refuses a file with another runtime directory: commands would look for the
// control socket there.
func (d *Daemon) canFollow(cfg *Config) error {
	if was := d.start.RuntimeDir; cfg.RuntimeDir != was {
		return fmt.Errorf("runtime_dir would be %s, and the control socket cannot move while walfleet runs: restart it, or set runtime_dir = %q", cfg.RuntimeDir, was)
	}
	return nil
}

// notes are what a reload cannot change.
func (d *Daemon) notes(cfg *Config) (notes []string) {
	if cfg.Log.Format != d.start.Log.Format {
		notes = append(notes, fmt.Sprintf("[log] format changes with the next start alone, it stays %q", d.start.Log.Format))
	}
	return notes
}

func (d *Daemon) logReload(out Outcome) {
	for _, note := range out.Notes {
		d.log.Warn(note)
	}
	switch {
	case !out.Applied:
		d.log.Error("reload refused, nothing changed", "config", d.file, "error", out.Error)
	case out.Error != "":
		d.log.Error("reload incomplete", "config", d.file, "done", out.Plan.String(), "error", out.Error)
	default:
		d.log.Info("reloaded", "config", d.file, "done", out.Plan.String())
	}
}

// Report is the state of everything now.
func (d *Daemon) Report() Report {
	d.mu.Lock()
	last, applied := d.last, d.applied
	d.mu.Unlock()
	r := Report{
		Time:   time.Now(),
		Daemon: &DaemonReport{PID: os.Getpid(), Version: d.version, Since: d.began, Config: d.file, Applied: applied, LastReload: last},
	}
	for _, c := range d.Status() {
		r.Clusters = append(r.Clusters, reportOf(c, r.Time))
	}
	return r
}

// ReportOf is the state of one cluster now, with its events; false: there is none of
// that name.
func (d *Daemon) ReportOf(cluster string) (Report, bool) {
	r, ok := d.Report().Cluster(cluster)
	if ok {
		r.Clusters[0].Events = d.events(cluster)
	}
	return r, ok
}

// Ready is nil when the fleet runs as the configuration file says; else it says why it
// does not: it has not begun, or the last reload was refused or incomplete.
func (d *Daemon) Ready() error {
	select {
	case <-d.Started():
	default:
		return errors.New("the receivers are being started")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.last != nil && d.last.Error != "" {
		return fmt.Errorf("the last reload failed: %s", d.last.Error)
	}
	return nil
}
