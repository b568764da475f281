// Package systemd tells systemd how a running fleet is, in the protocol of
// sd_notify(3): that it is ready, reloads or stops, a line for "systemctl status",
// and signs of life for the watchdog. Without NOTIFY_SOCKET in the environment it
// does nothing.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/fleet"
)

const (
	// statusInterval is how often the fleet's status is looked at for a change.
	statusInterval = time.Second
	// sendTimeout bounds one message: systemd may be busy.
	sendTimeout = time.Second
)

// Service is the part of a fleet that systemd sees. Make it with New, and run it
// once with Run.
type Service struct {
	fleet    supervisor
	log      *slog.Logger
	watchdog time.Duration              // systemd kills the process after this time without a sign of life; 0: never
	send     func(message string) error // nil: there is no systemd to tell

	mu      sync.Mutex // orders the messages, and guards what follows
	running bool       // between READY and STOPPING
	reloads int        // under way
	deaf    bool       // systemd: the last message did not arrive
}

// supervisor is what a fleet shows of itself.
type supervisor interface {
	Started() <-chan struct{}
	Status() []fleet.ClusterStatus
}

// New makes the service of a fleet, for the systemd that the environment names by
// NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID. A value that makes no sense is
// logged, and left out of account.
func New(f supervisor, log *slog.Logger) *Service {
	s := &Service{fleet: f, log: log}
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return s
	}
	if !strings.HasPrefix(socket, "/") && !strings.HasPrefix(socket, "@") {
		log.Warn("systemd is told nothing: its socket is neither a path nor an abstract name", "NOTIFY_SOCKET", socket)
		return s
	}
	s.send = func(message string) error { return send(socket, message) }
	var err error
	if s.watchdog, err = watchdog(os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")); err != nil {
		log.Warn("systemd's watchdog gets no sign of life", "error", err)
	}
	return s
}

// watchdog is sd_watchdog_enabled(3): the time that the variables ask for, if they
// are meant for this process; 0: there is no watchdog.
func watchdog(usec, pid string) (time.Duration, error) {
	if usec == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0, nil
	}
	n, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || n < 2 || n > int64(365*24*time.Hour/time.Microsecond) {
		return 0, fmt.Errorf("WATCHDOG_USEC=%q is no time in microseconds", usec)
	}
	return time.Duration(n) * time.Microsecond, nil
}

// send sends one message. A name that begins with @ is in the abstract namespace,
// for net as for systemd.
func send(socket, message string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	if err := conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return errors.Join(err, conn.Close())
	}
	_, err = conn.Write([]byte(message))
	return errors.Join(err, conn.Close())
}

// Run tells systemd that the fleet is ready once it has started, then what changes
// in its status, and that it is stopping when ctx is done, with which it returns.
//
// The watchdog gets a sign of life at half of its time, each after the fleet's
// status was had. When a lock of the supervision is held for good that never comes
// back, nor does this, and systemd does what the watchdog is for. A receiver or a
// disk that hangs is no reason: its siblings go on.
func (s *Service) Run(ctx context.Context) {
	if s.send == nil {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-s.fleet.Started():
	}
	told := summary(s.fleet.Status())
	s.ready(told)
	look := time.NewTicker(statusInterval)
	defer look.Stop()
	var feed <-chan time.Time // nil: there is no watchdog
	if s.watchdog > 0 {
		ticker := time.NewTicker(s.watchdog / 2)
		defer ticker.Stop()
		feed = ticker.C
	}
	for {
		life := ""
		select {
		case <-ctx.Done():
			s.stopping()
			return
		case <-look.C:
		case <-feed:
			life = "WATCHDOG=1"
		}
		now := summary(s.fleet.Status())
		if now != told {
			told = now
			life = strings.TrimSuffix("STATUS="+now+"\n"+life, "\n")
		}
		if life != "" {
			s.mu.Lock()
			s.tell(life)
			s.mu.Unlock()
		}
	}
}

func (s *Service) ready(status string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = true
	s.tell("READY=1\nSTATUS=" + status)
}

func (s *Service) stopping() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = false
	s.tell("STOPPING=1\nSTATUS=stopping")
}

// Reloading tells systemd that a reload begins, and the function that it returns
// that it has ended, however it did. Any goroutine may call both.
func (s *Service) Reloading() (done func()) {
	if s.send == nil {
		return func() {}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reloads++
	if s.running {
		// The time in the same message is what Type=notify-reload asks for, to tell
		// this reload from an earlier one.
		s.tell(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", monotonic()))
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reloads--
		if s.running && s.reloads == 0 {
			s.tell("READY=1")
		}
	}
}

// tell sends a message, and logs the first that does not arrive. s.mu is held.
func (s *Service) tell(message string) {
	err := s.send(message)
	switch {
	case err != nil && !s.deaf:
		s.log.Warn("systemd cannot be told how walfleet is", "error", err)
	case err == nil && s.deaf:
		s.log.Info("systemd can be told again how walfleet is")
	}
	s.deaf = err != nil
}

// monotonic is CLOCK_MONOTONIC, in microseconds. Go's own monotonic time counts
// from another moment.
func monotonic() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(fmt.Sprintf("internal error: CLOCK_MONOTONIC: %v", err)) // every kernel has it
	}
	return t.Nano() / 1000
}
