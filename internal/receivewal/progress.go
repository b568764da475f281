package receivewal

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/walfleet/walfleet/receiver"
)

// progressInterval is the time between two progress lines.
const progressInterval = 250 * time.Millisecond

// isTerminal tells whether w is a terminal.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// showProgress shows how a catch-up gets on, until ctx is done.
func (m *messages) showProgress(ctx context.Context, status func() receiver.Status) {
	defer m.endLine()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	before := int64(0) // bytes received before this catch-up
	for showing := false; ; {
		s := status()
		line := progressLine(s.ReceivedBytes-before, missing(s), time.Since(s.Since))
		switch {
		case s.State == receiver.CatchingUp && s.Written > 0:
			m.show(line)
			showing = true
		case showing:
			m.endLine()
			showing = false
			fallthrough
		default:
			before = s.ReceivedBytes
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// missing is the WAL in bytes that the server had, when it last spoke, and that has
// not come.
func missing(s receiver.Status) int64 {
	if s.ServerEnd <= s.Written {
		return 0
	}
	return int64(s.ServerEnd - s.Written)
}

// progressLine says in less than 80 columns how much has come, in bytes, how much is
// missing, how fast it came, and how long the rest takes at that.
func progressLine(received, missing int64, elapsed time.Duration) string {
	total := received + missing
	line := fmt.Sprintf("%s / %s", megabytes(received), megabytes(total))
	if total > 0 {
		line += fmt.Sprintf(" (%d %%)", 100*received/total)
	}
	if received == 0 || elapsed < time.Millisecond {
		return line
	}
	rate := float64(received) / elapsed.Seconds() // bytes per second
	left := "a long time"
	if seconds := float64(missing) / rate; seconds < 100*3600 {
		left = time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
	}
	return line + fmt.Sprintf(", %s/s, %s left", megabytes(int64(rate)), left)
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/(1<<20)) }
