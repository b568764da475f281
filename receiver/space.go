package receiver

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

// spaceInterval is how often the free space is looked at, and, while there is too
// little, how often the server hears from us.
const spaceInterval = time.Second

// spaceNews is the shortest time between two warnings: others may use the file system
// too, and what is free may go up and down around min_free.
const spaceNews = time.Minute

// spaceLog is what was logged about missing room.
type spaceLog struct {
	at    time.Time // of the last warning
	quiet int64     // times since that there was too little, and no warning
}

const hintSpace = "make room in archive_dir; the server keeps its WAL meanwhile, a synchronous one waits, and archiving goes on by itself"

// awaitSpace returns once the archive's file system has min_free bytes left, and
// room for another segment where n more bytes of WAL need one. Until then nothing is
// read or written: WAL stays on the server, and status updates with the flush
// position that was reached keep the connection.
func (s *stream) awaitSpace(ctx context.Context, n int) error {
	due := s.writer.SegmentDue(n)
	if s.settings().MinFree < 0 || !due && time.Now().Before(s.spaceAt) || ctx.Err() != nil {
		return nil
	}
	shortage, err := s.shortage(due)
	if err != nil || shortage == "" {
		return err
	}
	if err := s.flush(); err != nil {
		return err
	}
	s.publish()
	s.outage.add(trouble{state: Blocked, kind: "space"})
	s.setTrouble(Blocked, shortage, hintSpace)
	s.logShortage(ctx, shortage)
	for shortage != "" {
		if err := s.sendStatus(false); err != nil {
			return err
		}
		if !sleep(ctx, spaceInterval) {
			return nil
		}
		if shortage, err = s.shortage(due); err != nil {
			return err
		}
	}
	s.log.Log(ctx, s.level(slog.LevelInfo), "there is room again, archiving goes on")
	s.caughtUp = false
	s.setState(CatchingUp, "")
	s.lastHeard = time.Now() // nothing was read
	s.silenceAt = s.lastHeard.Add(s.in.ReceiveTimeout / 2)
	return nil
}

// logShortage warns of missing room, unless that was done just now.
func (s *stream) logShortage(ctx context.Context, shortage string) {
	l := &s.Receiver.scarce
	s.quietly = !l.at.IsZero() && time.Since(l.at) < spaceNews
	attrs := []any{"state", string(Blocked), "error", shortage, "flushed", s.now.flushed, "hint", hintSpace}
	if s.quietly {
		l.quiet++
	} else {
		if l.quiet > 0 {
			attrs = append(attrs, "repeated_before", l.quiet)
		}
		*l = spaceLog{at: time.Now()}
	}
	s.log.Log(ctx, s.level(slog.LevelWarn), MsgTrouble, attrs...)
}

// level is that of what follows from missing room that was logged quietly.
func (s *stream) level(level slog.Level) slog.Level {
	if s.quietly {
		return slog.LevelDebug
	}
	return level
}

// shortage says what room is missing, for another segment too where that is due;
// "": none.
func (s *stream) shortage(due bool) (string, error) {
	s.spaceAt = time.Now().Add(spaceInterval)
	free, err := s.freeBytes(s.dir)
	if err != nil {
		return "", err
	}
	s.room.Store(free + 1)
	reserve := s.settings().MinFree
	if free < reserve {
		return fmt.Sprintf("%s has %s left, less than min_free = %s", s.cfg.Dir, megabytes(free), megabytes(reserve)), nil
	}
	if size := int64(s.id.SegmentSize); due && free-size < reserve {
		return fmt.Sprintf("%s has %s left, and the next segment needs %s above min_free = %s: no space left on device",
			s.cfg.Dir, megabytes(free), megabytes(size), megabytes(reserve)), nil
	}
	return "", nil
}

// freeBytes is what the archive's file system has left. Any goroutine may call it.
func (r *Receiver) freeBytes(dir *archive.Dir) (int64, error) {
	if r.free != nil {
		return r.free()
	}
	return dir.Free()
}

func megabytes(n int64) string { return fmt.Sprintf("%d MB", n>>20) }
