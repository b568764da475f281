package receiver

import (
	"bytes"
	"encoding/binary"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestSegmentIsSealedOnlyWhenTheRecordAcrossItsEndIsComplete(t *testing.T) {
	for name, tt := range map[string]struct {
		size     int       // of the record that begins before the end of segment 0
		parts    []wal.LSN // what there is of the WAL, from origin
		partials int       // segments that the record touches
	}{
		"into the next":   {2000, []wal.LSN{mb, mb + 100}, 2},
		"through several": {2*mb + mb/2, []wal.LSN{mb, mb + 100, 2 * mb, 3*mb - 8, 3 * mb, 3*mb + 1000}, 4},
	} {
		for _, synchronous := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.cfg.Synchronous = synchronous
					g.appendTo(origin + mb - 1000)
					g.start()
					complete := g.wal.End()
					g.wal.Append(make([]byte, tt.size))
					for _, part := range tt.parts {
						g.publishTo(1, origin+part)
						g.sleep(11 * time.Second)
						if u := g.last(); u.flush != complete || u.write != origin+part {
							t.Errorf("up to %d: %+v", part, u)
						}
						for name := range g.files() {
							if len(name) == 24 {
								t.Errorf("%s is sealed, but the record that crosses its end is not complete", name)
							}
						}
					}
					g.publish(1)
					g.sleep(11 * time.Second)
					g.wantArchived()
					var want []string
					for i := range tt.partials - 1 {
						want = append(want, g.name(1, i))
					}
					g.wantFiles(append(want, g.name(1, tt.partials-1)+".partial")...)
					if n := g.logs.count(`msg="segment sealed"`); n != len(want) {
						t.Errorf("%d sealed segments logged", n)
					}
					g.restart()
					g.sleep(11 * time.Second)
					g.wantArchived()
				})
			})
		}
	}
}

// A message may cross the ends of segments, where a server would send two.
func TestMessageIsSplitAtSegmentEnds(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + mb - 48)
		g.append(40, 2000)
		g.serve(func(st *pgtest.Stream) {
			_ = st.Send(origin, g.wal.End(), g.wal.Bytes(origin, origin+mb-100000))
			_ = st.Send(origin+mb-100000, g.wal.End(), g.wal.Bytes(origin+mb-100000, g.wal.End()))
			<-st.Gone()
		})
		g.start()
		g.wantArchived()
		g.wantFiles(g.name(1, 0), g.name(1, 1)+".partial")
	})
}

// A segment that is switched away from ends in zeros.
func TestSwitchedSegmentIsSealed(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		for range 3 {
			g.switchSegment()
			g.wantArchived()
			g.restart()
			g.append(3, 100)
			g.wantArchived()
		}
		g.wantFiles(g.name(1, 0), g.name(1, 1), g.name(1, 2), g.name(1, 3)+".partial")
	})
}

func TestSealedSegmentIsNeverReplaced(t *testing.T) {
	for name, tt := range map[string]struct {
		segment int // that appears under its final name
		state   State
	}{
		"while it is written": {0, Backoff},
		"before it is begun":  {1, Halted},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				path := filepath.Join(g.cfg.Dir, g.name(1, tt.segment))
				foreign := make([]byte, mb) // not ours to replace
				g.appendTo(origin + mb - 2000)
				g.start()
				g.wantArchived()
				if err := os.WriteFile(path, foreign, 0o600); err != nil {
					t.Fatal(err)
				}
				g.append(1, 4000)
				g.want(tt.state, g.name(1, tt.segment))
				if data, err := os.ReadFile(path); !bytes.Equal(data, foreign) {
					t.Errorf("the file was replaced: %d bytes, %v", len(data), err)
				}
				if u := g.last(); u.flush >= origin+mb {
					t.Errorf("acknowledged %s without the segment", u.flush)
				}
				g.stop()
				os.Remove(path)
				g.start() // without that file all is well again
				g.wantArchived()
			})
		})
	}
}

func TestSilentServerIsAskedAndThenLeft(t *testing.T) {
	for name, answers := range map[string]bool{"dead": false, "idle": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.srv.Do(func(s *pgtest.State) { s.SenderTimeout = -1 }) // never sends by itself
				if !answers {
					g.serve(func(st *pgtest.Stream) { <-st.Gone() })
				}
				g.start()
				g.sleep(30*time.Second - 1)
				for _, u := range g.updates() {
					if u.ask {
						t.Errorf("asked too early: %+v", u)
					}
				}
				g.sleep(1)
				if u := g.last(); !u.ask {
					t.Errorf("not asked after half of receive_timeout: %+v", u)
				}
				first := g.stream()
				g.sleep(30*time.Second - 1)
				if first.Ended().Gone {
					t.Error("left before receive_timeout")
				}
				g.sleep(1)
				if first.Ended().Gone != !answers {
					t.Errorf("after receive_timeout: left is %v", !answers)
				}
				if answers {
					g.sleep(10 * time.Minute)
					if first.Ended().Gone || g.r.Status().Reconnects != 0 {
						t.Error("an idle server that answers was left")
					}
					return
				}
				g.want(Backoff, "no message from the server for 1m0s")
				g.serve(nil)
				g.sleep(5 * time.Second)
				g.wantArchived()
			})
		})
	}
}

func TestMessageThatNoServerSendsEndsTheSessionAlone(t *testing.T) {
	copyData := func(p ...byte) pgproto3.BackendMessage { return &pgproto3.CopyData{Data: p} }
	for name, tt := range map[string]struct {
		send func(st *pgtest.Stream, next wal.LSN, page []byte) error
		want string
	}{
		"empty":   {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error { return st.SendMessage(copyData()) }, "empty copy data message"},
		"unknown": {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error { return st.SendMessage(copyData('z', 1)) }, `unknown copy data message 'z'`},
		"short WAL": {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error {
			return st.SendMessage(copyData('w', 0, 0, 0, 0, 4))
		}, "XLogData of 6 bytes is too short"},
		"short keepalive": {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error { return st.SendMessage(copyData('k', 0)) }, "keepalive of 2 bytes"},
		"a row":           {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error { return st.SendMessage(&pgproto3.DataRow{}) }, "unexpected *pgproto3.DataRow"},
		"gap":             {func(st *pgtest.Stream, l wal.LSN, p []byte) error { return st.Send(l+8, l+8192, p) }, "WAL from 0/4002008 on came where 0/4002000 was next"},
		"next segment":    {func(st *pgtest.Stream, _ wal.LSN, p []byte) error { return st.Send(origin+mb, origin+2*mb, p) }, "WAL from 0/4100000 on came where 0/4002000 was next"},
		"backwards":       {func(st *pgtest.Stream, l wal.LSN, p []byte) error { return st.Send(l-8192, l, p) }, "WAL from 0/4000000 on came where 0/4002000 was next"},
		"end of all WAL":  {func(st *pgtest.Stream, l wal.LSN, p []byte) error { return st.Send(^wal.LSN(7), l, p) }, "passes the end of all WAL"},
		"no page":         {func(st *pgtest.Stream, l wal.LSN, p []byte) error { p[0] ^= 1; p[1] = 0; return st.Send(l, l+8192, p) }, "invalid WAL at 0/4002000: page magic"},
		"another page": {func(st *pgtest.Stream, l wal.LSN, p []byte) error {
			binary.LittleEndian.PutUint64(p[8:], uint64(l)+8192)
			return st.Send(l, l+8192, p)
		}, "invalid WAL at 0/4002000: the page says that it is 0/4004000"},
		"no record": {func(st *pgtest.Stream, l wal.LSN, p []byte) error {
			binary.LittleEndian.PutUint32(p[24:], 3)
			return st.Send(l, l+8192, p)
		}, "invalid WAL at 0/4002018: record: length 3"},
		"1 GB": {func(st *pgtest.Stream, _ wal.LSN, _ []byte) error { return st.SendBytes([]byte{'d', 0x40, 0, 0, 0}) }, "message of 1073741820 bytes, more than the"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				next := origin + wal.PageSize
				g.wal.FillTo(next)
				g.publish(1)
				more := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: mb, Start: next})
				more.FillTo(next + wal.PageSize)
				strike := make(chan struct{})
				g.serve(func(st *pgtest.Stream) {
					if g.srv.Streams()[0] != st {
						st.Serve()
						return
					}
					_ = st.Send(origin, next, g.wal.Bytes(origin, next))
					<-strike
					if err := tt.send(st, next, more.Bytes(next, next+wal.PageSize)); err != nil {
						t.Error(err)
					}
					<-st.Gone()
				})
				g.start()
				g.wantArchived()
				before := g.files()
				close(strike)
				g.want(Backoff, tt.want)
				if after := g.files(); !maps.Equal(before, after) {
					t.Errorf("the archive changed:\n%v\n%v", before, after)
				}
				g.append(30, 900)
				g.sleep(2 * time.Second)
				g.wantArchived()
				if s := g.r.Status(); s.Reconnects != 1 {
					t.Errorf("%d reconnects", s.Reconnects)
				}
			})
		})
	}
}

func TestMessageWithoutWALIsTaken(t *testing.T) {
	bubble(t, func(g *rig) {
		g.serve(func(st *pgtest.Stream) {
			_ = st.Send(origin, g.wal.End(), nil)
			_ = st.SendMessage(&pgproto3.NoticeResponse{}, &pgproto3.ParameterStatus{Name: "a", Value: "b"})
			st.Serve()
		})
		g.start()
		g.wantArchived()
	})
}

// What a server sends in its last moments is archived and acknowledged: it waits for that.
func TestServerThatShutsDownIsGivenEverything(t *testing.T) {
	for _, synchronous := range []bool{true, false} {
		bubble(t, func(g *rig) {
			g.cfg.Synchronous, g.cfg.FlushInterval = synchronous, time.Hour
			g.start()
			g.append(3, 100)
			g.srv.Do(func(s *pgtest.State) { s.ShuttingDown = true })
			synctest.Wait()
			if u := g.last(); u.flush != g.wal.End() {
				t.Errorf("%+v, want %s", u, g.wal.End())
			}
			g.want(Backoff, "shutting down")
			g.srv.Do(func(s *pgtest.State) { s.ShuttingDown = false })
			g.append(3, 100)
			g.sleep(2 * time.Second)
			if synchronous {
				g.wantArchived()
			}
		})
	}
}

// A standby's WAL can end inside a record. When it shuts down it waits until all that it sent is acknowledged,
// and goes by the write position where there is no flush position (WalSndDone in walsender.c).
func TestStandbyThatShutsDownInsideARecordIsLetGo(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.Do(func(s *pgtest.State) { s.Standby = true })
		g.cfg.Source = SourceAny
		g.start()
		g.append(3, 100)
		complete := g.wal.End()
		_, end := g.wal.Append(make([]byte, 5000))
		cut := (complete + end) / 2
		g.publishTo(1, cut)
		synctest.Wait()
		if u := g.last(); u.flush != complete {
			t.Fatalf("%+v, want flush %s", u, complete)
		}
		g.updates()
		if err := g.stream().Keepalive(cut, true); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		sent := g.updates()
		if len(sent) != 1 || sent[0].write != cut || sent[0].flush != 0 {
			t.Errorf("answered with %+v, want write %s without a flush position, and nothing after it", sent, cut)
		}
	})
}

func TestCatchingUpTurnsIntoStreaming(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + 100<<10)
		g.serve(trickle(g.wal, 8<<10, time.Second))
		g.start()
		g.sleep(5 * time.Second)
		g.want(CatchingUp)
		if lag := g.r.Status().Lag(); lag <= 0 || lag >= 100<<10 {
			t.Errorf("lag %d", lag)
		}
		g.sleep(time.Minute)
		g.wantArchived()
		if g.logs.count(`msg="caught up, streaming"`) != 1 {
			t.Errorf("the log does not tell:\n%s", g.logs.last(12))
		}
	})
}

// After a restart WAL is received again from a record that the server gave up, which no CRC covers. What was
// acknowledged behind it stays acknowledged: the rig sees each flush position that would move the slot back.
func TestFlushDoesNotGoBackToAnAbandonedRecord(t *testing.T) {
	bubble(t, func(g *rig) {
		g.wal.Abort(make([]byte, 40000), 3)
		g.append(100, 1000)
		g.start()
		g.wantArchived()
		g.serve(trickle(g.wal, 4<<10, 100*time.Millisecond))
		g.restart()
		g.sleep(time.Minute)
		if u := g.last(); u.flush != g.wal.End() {
			t.Errorf("%+v, want %s", u, g.wal.End())
		}
	})
}

// A message can carry WAL that differs behind a record which the server gave up, and goes on into the next segment.
// The segment is not sealed with the one's or the other's bytes.
func TestSegmentIsNotSealedWhenAMessageDivergesInIt(t *testing.T) {
	bubble(t, func(g *rig) {
		w := newWAL(g.size)
		w.FillTo(origin + mb - 60000)
		w.Abort(make([]byte, 40000), 3)
		start := w.End()
		w.FillTo(start + 8000)
		g.wal = w
		g.publish(1)
		g.start()
		g.wantArchived()
		g.stop()
		v := newWAL(g.size)
		v.FillTo(origin + mb - 60000)
		v.Abort(make([]byte, 40000), 3)
		v.Append([]byte("another"))
		v.FillTo(origin + mb + 30000)
		before := g.files()
		g.srv.Publish(v)
		g.start()
		g.sleep(10 * time.Second)
		g.want(Halted, "differs from the archive")
		g.wantFiles(g.name(1, 0) + ".partial")
		if g.files()[g.name(1, 0)+".partial"] != before[g.name(1, 0)+".partial"] {
			t.Error("the archive changed")
		}
	})
}
