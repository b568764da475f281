// Package receivewal is pg_receivewal on walfleet's receiver: its command line, its
// messages and its exit statuses. How it archives is the receiver's business, so
// what the daemon promises holds here too.
package receivewal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/receiver"
)

const (
	// reconnectPause is the time between the end of a connection and the next one
	// (RECONNECT_SLEEP_TIME in pg_receivewal.c).
	reconnectPause = 5 * time.Second
	// secondSignal is how much later than the first another signal ends the process.
	secondSignal = time.Second
	// receiveTimeout bounds a server's silence, and each of its answers.
	receiveTimeout = time.Minute
)

// Streams are what a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Main runs a command line, without the program's name, and returns its exit status:
// 0, or 1 for everything that went wrong, usage included. version is walfleet's.
func Main(args []string, version string, std Streams) int {
	return run(args, version, std, "/dev/tty")
}

func run(args []string, version string, std Streams, tty string) int {
	m := &messages{out: std.Err}
	o, err := parse(args)
	var wrong *commandLineError
	switch {
	case errors.As(err, &wrong):
		m.commandLine(wrong)
		return 1
	case o.help:
		fmt.Fprint(std.Out, help)
		return 0
	case o.version:
		fmt.Fprintf(std.Out, versionFormat, version)
		return 0
	}
	m.verbose = o.Verbose
	c := &command{Options: o, messages: m, std: std, tty: tty}
	if err := c.run(); err != nil {
		m.fail("%s", describe(err))
		return 1
	}
	return 0
}

// command is a command line that is carried out.
type command struct {
	Options
	*messages
	std      Streams
	tty      string // the terminal to ask for a password on
	asked    bool   // for the password
	password string // what was answered
}

func (c *command) run() error {
	if !c.slotAction() {
		d, err := os.Open(c.Directory)
		if err == nil {
			_, err = d.Readdirnames(1)
			d.Close()
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("could not open directory \"%s\": %s", c.Directory, errnoText(err))
		}
	}
	if err := checkPort(c.Port); err != nil {
		return err
	}
	if c.Password == PromptFirst {
		if err := c.ask(); err != nil {
			return err
		}
	}
	conninfo, err := pgrepl.ParseConninfo(c.conninfo())
	if err != nil {
		return err
	}
	if w := conninfo.Warning(); w != "" {
		fmt.Fprintln(c.std.Err, "WARNING:", w)
	}
	if c.slotAction() {
		return c.actOnSlot(conninfo)
	}
	return c.stream()
}

// checkPort does what libpq does with a port, or a list of one for each host.
func checkPort(ports string) error {
	for port := range strings.SplitSeq(ports, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(port))
		switch {
		case port == "":
		case errors.Is(err, strconv.ErrSyntax):
			return fmt.Errorf("invalid integer value \"%s\" for connection option \"port\"", port)
		case err != nil || n < 1 || n > 65535:
			return fmt.Errorf("invalid port number: \"%s\"", port)
		}
	}
	return nil
}

// ask asks for the password, which later connections use too.
func (c *command) ask() (err error) {
	c.asked = true
	c.password, err = askPassword(c.tty, c.std.In, c.std.Err)
	return err
}

// mayAsk tells whether a connection failed for want of a password that can be asked
// for.
func (c *command) mayAsk(err error) bool {
	return errors.Is(err, pgrepl.ErrNoPassword) && c.Password != PromptNever && !c.asked
}

// conninfo is where to connect: what --dbname says, and the other options, which
// count more. The database's name matters to a passfile alone, where it is the
// keyword "replication".
func (c *command) conninfo() string {
	settings := [][2]string{{"dbname", "replication"}, {"fallback_application_name", program}}
	for _, s := range [][2]string{{"host", c.Host}, {"port", c.Port}, {"user", c.User}, {"password", c.password}} {
		if s[1] != "" {
			settings = append(settings, s)
		}
	}
	return pgrepl.Override(c.Conninfo, settings)
}

// actOnSlot creates or drops the slot.
func (c *command) actOnSlot(conninfo *pgrepl.Conninfo) error {
	ctx := context.Background()
	conn, err := connect(ctx, conninfo)
	if err != nil && c.mayAsk(err) {
		if err := c.ask(); err != nil {
			return err
		}
		if conninfo, err = pgrepl.ParseConninfo(c.conninfo()); err != nil {
			return err
		}
		conn, err = connect(ctx, conninfo)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Identify(ctx); err != nil {
		return err
	}
	if c.DropSlot {
		c.detail("dropping replication slot \"%s\"", c.Slot)
		return conn.DropSlot(ctx, c.Slot)
	}
	c.detail("creating replication slot \"%s\"", c.Slot)
	err = conn.CreateSlot(ctx, c.Slot, false)
	if c.IfNotExists && pgrepl.Code(err) == pgrepl.CodeDuplicateObject {
		return nil
	}
	return err
}

// connect connects to the first host that can be reached.
func connect(ctx context.Context, conninfo *pgrepl.Conninfo) (*pgrepl.Conn, error) {
	var failed receiver.HostsError
	for _, host := range conninfo.Order() {
		conn, err := conninfo.Connect(ctx, host, pgrepl.Options{Timeout: receiveTimeout})
		if err == nil {
			return conn, nil
		}
		failed = append(failed, err)
	}
	return nil, failed
}

// stream archives until a signal, the end position, or an error that ends it.
func (c *command) stream() error {
	ctx, stop := c.untilSignal()
	defer func() { stop() }()
	reached := false // a server, so that later trouble is no reason to give up
	for {
		r := receiver.New(c.config(), slog.New(c.messages), receiver.NewShared(1, 1))
		err := c.keepArchiving(ctx, r, &reached)
		again := c.mayAsk(err)
		if !again { // scripts find what they expect, once this has ended
			if cerr := r.CompressSealed(context.Background()); cerr != nil {
				c.print("warning: %s", describe(cerr))
			}
		}
		if err := errors.Join(err, r.Close()); !again {
			return err
		}
		stop()
		if err := c.ask(); err != nil {
			return err
		}
		ctx, stop = c.untilSignal()
	}
}

// untilSignal makes a context that ends with the first SIGINT or SIGTERM. A later
// one ends the process; one that comes with the first does not: timeout(1) sends it
// twice.
func (c *command) untilSignal() (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-signals:
			time.AfterFunc(secondSignal, func() { signal.Stop(signals) }) // or the process is gone by then
			c.messages.stop("received interrupt signal, exiting")
			cancel()
		case <-done:
			signal.Stop(signals)
		}
	}()
	return ctx, sync.OnceFunc(func() {
		close(done)
		<-ended
		cancel()
	})
}

func (c *command) config() receiver.Config {
	return receiver.Config{
		Name: program, Dir: c.Directory, Conninfo: c.conninfo(),
		Slot: c.Slot, SlotAsIs: true, Source: receiver.SourceAny,
		Synchronous: c.Synchronous, NoSync: c.NoSync, EndPos: c.EndPos, Compress: c.Compress,
		Adjustable: receiver.Adjustable{
			OnGap: receiver.GapHalt, MinFree: -1, StatusInterval: c.StatusInterval, ReceiveTimeout: receiveTimeout,
		},
	}
}

// keepArchiving archives over one connection after another. The error is the last
// one; it was not printed.
func (c *command) keepArchiving(ctx context.Context, r *receiver.Receiver, reached *bool) error {
	if c.Progress && isTerminal(c.std.Err) {
		watching, stop := context.WithCancel(context.Background())
		var watcher sync.WaitGroup
		watcher.Go(func() { c.showProgress(watching, r.Status) })
		defer watcher.Wait()
		defer stop()
	}
	for {
		err := r.RunOnce(ctx)
		*reached = *reached || r.Status().Host != ""
		if err == nil {
			c.stopAgain()
			return nil
		}
		if !*reached || archive.SyncFailed(err) || c.mayAsk(err) {
			return err
		}
		c.fail("%s", describe(err))
		if c.NoLoop {
			return errors.New("disconnected")
		}
		c.print("disconnected; waiting %d seconds to try again", int(reconnectPause.Seconds()))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(reconnectPause):
		}
	}
}
