package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// scripted is a daemon that reports what it is told to, and does nothing.
type scripted struct {
	config, dir string // the file and the runtime directory

	mu       sync.Mutex
	clusters []fleet.ClusterReport
	hang     chan struct{} // reports wait for its end; nil: they do not
}

func (s *scripted) Report() fleet.Report {
	s.mu.Lock()
	hang := s.hang
	s.mu.Unlock()
	if hang != nil {
		<-hang
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return fleet.Report{Time: time.Now(), Daemon: &fleet.DaemonReport{PID: 7, Since: time.Now()}, Clusters: s.clusters}
}

func (s *scripted) ReportOf(cluster string) (fleet.Report, bool) { return s.Report().Cluster(cluster) }

func (s *scripted) Decide(context.Context, string, receiver.Decision) (string, error) {
	return "", errors.ErrUnsupported
}
func (s *scripted) Prune(context.Context, string, wal.LSN) ([]string, error) {
	return nil, errors.ErrUnsupported
}
func (s *scripted) Reload(context.Context, string) fleet.Outcome { return fleet.Outcome{} }
func (s *scripted) Preview(string, []byte) fleet.Outcome         { return fleet.Outcome{} }

// set is what every report has from now on.
func (s *scripted) set(clusters ...fleet.ClusterReport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clusters = clusters
}

// newScripted makes a configuration with one cluster, "orders", for which no daemon runs yet.
func newScripted(t *testing.T) *scripted {
	t.Helper()
	dir, err := os.MkdirTemp("", "walfleet-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &scripted{dir: dir, config: filepath.Join(dir, "walfleet.toml")}
	text := fmt.Sprintf("archive_dir = %q\n[[cluster]]\nname = \"orders\"\nconninfo = \"host=%s/none user=u\"\n", dir, dir)
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// start lets the daemon answer until stop.
func (s *scripted) start(t *testing.T) (stop func()) {
	t.Helper()
	l, err := control.Listen(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- control.Serve(ctx, l, s) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// terminal is a pseudo-terminal, and the program that runs on it.
type terminal struct {
	t       *testing.T
	master  *os.File
	slave   *os.File
	cmd     *exec.Cmd
	before  *unix.Termios
	changed chan struct{} // something was written; closed: the program has ended

	mu     sync.Mutex
	screen screen
}

func onTerminal(t *testing.T, width, height uint16, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("NOT TESTED: there are no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	if errControl := conn.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); errControl != nil || err != nil {
		t.Fatal(errControl, err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	term := &terminal{t: t, master: master, slave: slave, cmd: program(t, args...), changed: make(chan struct{}, 1)}
	term.resize(width, height)
	if term.before, err = unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil {
		t.Fatal(err)
	}
	term.cmd.Stdin, term.cmd.Stdout, term.cmd.Stderr = slave, slave, slave
	term.cmd.Env = append(term.cmd.Env, "TERM=xterm", "NO_COLOR=")
	term.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := term.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		buffer := make([]byte, 64<<10)
		for {
			n, err := master.Read(buffer)
			if err != nil {
				return
			}
			term.mu.Lock()
			term.screen.write(string(buffer[:n]))
			term.mu.Unlock()
			select {
			case term.changed <- struct{}{}:
			default:
			}
		}
	}()
	t.Cleanup(func() {
		_ = term.cmd.Process.Kill()
		_ = term.cmd.Wait()
		_ = master.SetReadDeadline(time.Unix(1, 0))
		<-read
	})
	return term
}

func (term *terminal) resize(width, height uint16) {
	term.t.Helper()
	if err := unix.IoctlSetWinsize(int(term.slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width}); err != nil {
		term.t.Fatal(err)
	}
}

func (term *terminal) press(keys string) {
	term.t.Helper()
	if _, err := term.master.WriteString(keys); err != nil {
		term.t.Fatal(err)
	}
}

// until waits until the terminal shows what is wanted: a regular expression for its lines.
func (term *terminal) until(pattern string) {
	term.t.Helper()
	wanted := regexp.MustCompile("(?ms)" + pattern)
	late := time.After(time.Minute)
	for {
		term.mu.Lock()
		shown, problem := term.screen.String(), term.screen.problem
		term.mu.Unlock()
		if problem != "" {
			term.t.Fatal(problem)
		}
		if wanted.MatchString(shown) {
			return
		}
		select {
		case <-term.changed:
		case <-late:
			term.t.Fatalf("the terminal does not show %s, but\n%s", pattern, shown)
		}
	}
}

// ends waits for the program's end, and wants the terminal to be as it was.
func (term *terminal) ends() {
	term.t.Helper()
	if err := term.cmd.Wait(); err != nil {
		term.t.Errorf("%v", err)
	}
	term.until(`\Athe shell's own screen\n\z`)
	after, err := unix.IoctlGetTermios(int(term.slave.Fd()), unix.TCGETS)
	if err != nil {
		term.t.Fatal(err)
	}
	if *after != *term.before {
		term.t.Errorf("the terminal's settings are\n%+v, and were\n%+v", *after, *term.before)
	}
	term.mu.Lock()
	defer term.mu.Unlock()
	if term.screen.noCursor || term.screen.noWrap {
		term.t.Errorf("the cursor is hidden: %t, lines do not wrap: %t", term.screen.noCursor, term.screen.noWrap)
	}
}

// screen is what a terminal shows of the alternate screen: as much as the commands that
// walfleet uses. Anything else is a problem.
type screen struct {
	rest                        string // of a command that is not complete yet
	lines                       []string
	row                         int
	alternate, noCursor, noWrap bool
	commands                    map[string]int // how often
	problem                     string
}

var (
	commandPattern = regexp.MustCompile(`\A\x1b\[(\??[0-9;]*)([A-Za-z])`)
	partPattern    = regexp.MustCompile(`\A\x1b(\[\??[0-9;]*)?\z`)
)

func (s *screen) write(text string) {
	if s.commands == nil {
		s.commands = map[string]int{}
	}
	for text = s.rest + text; text != ""; {
		s.rest = ""
		if partPattern.MatchString(text) || !utf8.FullRuneInString(text) {
			s.rest = text
			return
		}
		if m := commandPattern.FindStringSubmatch(text); m != nil {
			text = text[len(m[0]):]
			s.command(m[1], m[2])
			continue
		}
		c, n := utf8.DecodeRuneInString(text)
		text = text[n:]
		if c < ' ' || c == utf8.RuneError || !s.alternate {
			s.problem = fmt.Sprintf("%q was written, alternate screen %t", c, s.alternate)
			return
		}
		s.lines[s.row] += string(c)
	}
}

func (s *screen) command(arguments, name string) {
	s.commands[arguments+name]++
	switch arguments + name {
	case "?1049h":
		s.alternate = true
	case "?1049l":
		s.alternate = false
	case "?25l", "?25h":
		s.noCursor = name == "l"
	case "?7l", "?7h":
		s.noWrap = name == "l"
	case "2J":
		s.lines = nil
	case "K":
		s.lines[s.row] = ""
	default:
		var row, column int
		if n, err := fmt.Sscanf(arguments+name, "%d;%dH", &row, &column); n == 2 && err == nil && row >= 1 && column == 1 {
			s.row = row - 1
			for len(s.lines) < row {
				s.lines = append(s.lines, "")
			}
		} else if name != "m" {
			s.problem = fmt.Sprintf("unexpected command %q", arguments+name)
		}
	}
}

func (s *screen) String() string {
	if !s.alternate {
		return "the shell's own screen\n"
	}
	return strings.Join(s.lines, "\n") + "\n"
}

func streaming(name string) fleet.ClusterReport {
	return fleet.ClusterReport{Name: name, State: "streaming", Health: fleet.Healthy, Since: time.Now()}
}

// What the daemon says is on the terminal a second later, whatever the terminal's size;
// what it said last stays while it does not answer, and is marked.
func TestWatchFollowsTheDaemonAndTheTerminal(t *testing.T) {
	s := newScripted(t)
	s.set(streaming("orders"), streaming("billing"))
	stop := s.start(t)
	term := onTerminal(t, 80, 10, "status", "--watch", "-c", s.config)
	term.until(`\AAll 2 databases are archived .* UTC$.*^orders +streaming.*^billing +streaming.*^q quits$`)

	bad := fleet.ClusterReport{Name: "billing", State: "halted", Health: fleet.Critical, Reason: "WAL is missing"}
	s.set(streaming("orders"), bad)
	term.until(`\A1 of 2 databases is NOT being archived: billing .*^billing +!! halted.*WAL is missing$.*^orders`)

	var many []fleet.ClusterReport
	for i := range 100 {
		many = append(many, streaming(fmt.Sprintf("c%02d", i)))
	}
	s.set(many...)
	term.until(`^CLUSTER.*^c00 .*^c04 [^\n]*\n… 95 more;`)
	term.press("\x1b[B\x1b[B\x1b[6~")
	term.until(`^CLUSTER[^\n]*\nc04 `)
	term.press("\x1b[F")
	term.until(`^CLUSTER[^\n]*\nc95 .*^c99`)
	term.resize(30, 20)
	term.until(`\AAll 100 databas…  .*^CLUSTER[^\n]*\nc85 .*^c99 [^\n]*\n… 85 more;`)
	term.press("\x1b[1~")
	term.until(`^CLUSTER[^\n]*\nc00 `)

	term.resize(200, 10)
	stop()
	term.until(`^NO NEWS for [0-9]+s: no walfleet answers at .*^What follows is how it was at .*^c00 `)
	s.set(streaming("orders"))
	s.start(t)
	term.until(`\AThe database is archived: orders .*^orders +streaming`)
	term.press("q")
	term.ends()
	if n := term.screen.commands["2J"]; n != 3 {
		t.Errorf("the whole screen was cleared %d times, with two changes of its size", n)
	}
}

// A daemon that takes long is no reason not to scroll or to end, and is told of.
func TestWatchOfADaemonThatHangs(t *testing.T) {
	s := newScripted(t)
	s.set(streaming("orders"))
	s.start(t)
	term := onTerminal(t, 100, 10, "status", "orders", "--watch", "-c", s.config)
	term.until(`^  state +streaming`)
	hang := make(chan struct{})
	s.mu.Lock()
	s.hang = hang
	s.mu.Unlock()
	defer close(hang)
	term.until(`^NO NEWS for [0-9]+s: walfleet takes long to answer`)
	term.press("\x1b[B")
	term.until(`^… [0-9]+ more`)
	term.press("q")
	term.ends()
}

// With no daemon there is what the archives say, until one is there.
func TestWatchBeginsWithoutADaemon(t *testing.T) {
	s := newScripted(t)
	term := onTerminal(t, 200, 10, "status", "--watch", "-c", s.config)
	term.until(`\ANO DAEMON: .*^no walfleet answers at .*^orders .*there is no directory yet$`)
	s.set(streaming("orders"))
	s.start(t)
	term.until(`\AThe database is archived: orders`)
	s.set(streaming("billing"))
	term.until(`\AThe database is archived: billing`)
	term.press("\x03")
	term.ends()
}

// However it ends, the shell gets its terminal back.
func TestWatchGivesTheTerminalBack(t *testing.T) {
	for name, end := range map[string]func(*terminal){
		"q":       func(term *terminal) { term.press("q") },
		"Ctrl-C":  func(term *terminal) { term.press("\x03") },
		"SIGTERM": func(term *terminal) { _ = term.cmd.Process.Signal(syscall.SIGTERM) },
		"SIGINT":  func(term *terminal) { _ = term.cmd.Process.Signal(syscall.SIGINT) },
		"SIGHUP":  func(term *terminal) { _ = term.cmd.Process.Signal(syscall.SIGHUP) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newScripted(t)
			s.set(streaming("orders"))
			s.start(t)
			term := onTerminal(t, 80, 10, "status", "--watch", "-c", s.config)
			term.until(`\AThe database is archived: orders`)
			end(term)
			term.ends()
		})
	}
}

// What does not fill a terminal is no use: a pipe, and a terminal that is dumb.
func TestWatchNeedsATerminal(t *testing.T) {
	s := newScripted(t)
	out, err := program(t, "status", "--watch", "-c", s.config).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "--watch needs a terminal") || !strings.Contains(string(out), "--json") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestKeysComeInPieces(t *testing.T) {
	for input, want := range map[string][]key{
		"q": {keyQuit}, "\x1b[Aj\x1b[5~": {keyUp, keyDown, keyPageUp}, "\x1bOF\x1b[4~G": {keyEnd, keyEnd, keyEnd},
		"x\x1b[15~é\x1b\x1b[Hq": {keyHome, keyQuit}, "\x1b": nil, "\x1b[": nil,
	} {
		for split := range len(input) + 1 {
			var got []key
			rest := ""
			for _, piece := range []string{input[:split], input[split:]} {
				for rest += piece; ; {
					k, left, ok := nextKey(rest)
					if rest = left; !ok {
						break
					}
					got = append(got, k)
				}
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%q split at %d: %v, want %v", input, split, got, want)
			}
		}
	}
}
