package receiver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestEmptyArchiveStartsAtTheSlot(t *testing.T) {
	const readable = "readable"
	for name, tt := range map[string]struct {
		version string // and whether an ordinary connection may read pg_replication_slots
		restart int    // of the slot, in MB after origin; -1: none is reserved, -2: there is no slot
		want    int    // first segment
		source  string // in archive.json
		reason  string // of a halt
	}{
		"created with WAL reserved":      {"17.2", -2, 2, `"slot"`, ""},
		"existing":                       {"17.2", 0, 0, `"slot"`, ""},
		"existing, later":                {"15.8", 1, 1, `"slot"`, ""},
		"existing, without WAL":          {"17.2", -1, 2, `"current position"`, ""},
		"13: created":                    {"13.4", -2, 2, `"current position"`, ""},
		"13: existing and unreadable":    {"13.4", 0, 0, "", "could not be created"},
		"14: created":                    {"14.9", -2, 2, `"current position"`, ""},
		"14: existing and readable":      {"14.9" + readable, 1, 1, `"slot"`, ""},
		"13: existing, without WAL":      {"13.4" + readable, -1, 2, `"current position"`, ""},
		"13: created where one can read": {"13.4" + readable, -2, 2, `"slot"`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.appendTo(origin + 2*mb + 5000)
				g.srv.Do(func(s *pgtest.State) {
					s.Version = strings.TrimSuffix(tt.version, readable)
					switch delete(s.Slots, g.cfg.Slot); tt.restart {
					case -2:
					case -1:
						s.Slots[g.cfg.Slot] = &pgtest.Slot{}
					default:
						s.Slots[g.cfg.Slot] = &pgtest.Slot{RestartLSN: origin + wal.LSN(tt.restart)*mb + 100}
					}
				})
				g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
					if !strings.Contains(q.SQL, "pg_replication_slots") {
						return nil
					}
					if !strings.HasSuffix(tt.version, readable) {
						return []pgproto3.BackendMessage{pgtest.Error("42501", "permission denied")}
					}
					if q.Startup["replication"] != "" || string(q.Args[0]) != g.cfg.Slot {
						t.Errorf("%+v", q)
					}
					return g.selectSlot("reserved")
				}
				g.start()
				if tt.reason != "" {
					g.want(Halted, tt.reason)
					g.wantFiles()
					return
				}
				g.append(1, 100)
				g.wantArchived()
				names, _ := filepath.Glob(filepath.Join(g.cfg.Dir, "0*"))
				if len(names) == 0 || strings.TrimSuffix(filepath.Base(names[0]), ".partial") != g.name(1, tt.want) {
					t.Errorf("the archive begins with %q, want %s", names, g.name(1, tt.want))
				}
				meta, _ := os.ReadFile(filepath.Join(g.cfg.Dir, "archive.json"))
				if lsn := origin + wal.LSN(tt.want)*mb; !strings.Contains(string(meta), tt.source) || !strings.Contains(string(meta), `"`+lsn.String()+`"`) {
					t.Errorf("origin %s, want %s and %s", meta, tt.source, lsn)
				}
			})
		})
	}
}

// selectSlot is the answer to the query of pg_replication_slots.
func (g *rig) selectSlot(walStatus string) []pgproto3.BackendMessage {
	slot, columns := g.slot(), []string{"slot_type", "restart_lsn", "wal_status"}
	switch {
	case slot == nil:
		return pgtest.Result("SELECT 0", columns)
	case slot.RestartLSN == 0:
		return pgtest.Result("SELECT 1", columns, []any{"physical", nil, nil})
	}
	return pgtest.Result("SELECT 1", columns, []any{"physical", slot.RestartLSN, walStatus})
}

// An archive that was begun, and stopped before any WAL came, begins where it was going to.
func TestOriginIsKept(t *testing.T) {
	bubble(t, func(g *rig) {
		g.serve(func(st *pgtest.Stream) { <-st.Gone() })
		g.start()
		g.stop()
		g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = origin + mb })
		g.serve(nil)
		g.appendTo(origin + mb + 3000)
		g.start()
		g.wantArchived()
		g.wantFiles(g.name(1, 0), g.name(1, 1)+".partial")
	})
}

func TestTroubleEndsByItselfOrNeedsAPerson(t *testing.T) {
	lock := func(g *rig) (undo func()) {
		d, err := archive.Open(g.cfg.Dir)
		if err != nil {
			g.Fatal(err)
		}
		return func() { d.Close() }
	}
	state := func(f, undo func(s *pgtest.State)) func(*rig) func() {
		return func(g *rig) func() {
			g.srv.Do(f)
			return func() { g.srv.Do(undo) }
		}
	}
	refuse := func(e *pgproto3.ErrorResponse) func(*rig) func() {
		return state(func(s *pgtest.State) { s.StartupError = e }, func(s *pgtest.State) { s.StartupError = nil })
	}
	slot := func(f, undo func(*pgtest.Slot)) func(*rig) func() {
		return state(func(s *pgtest.State) { f(s.Slots["walfleet"]) }, func(s *pgtest.State) { undo(s.Slots["walfleet"]) })
	}
	for name, tt := range map[string]struct {
		cause func(*rig) (undo func())
		state State
		want  string
	}{
		"unreachable": {state(func(s *pgtest.State) { s.DialError = errors.New("no route to host") }, func(s *pgtest.State) { s.DialError = nil }),
			Backoff, "no route to host"},
		"starting up":      {refuse(pgtest.Fatal("57P03", "the database system is starting up")), Backoff, "starting up"},
		"too many":         {refuse(pgtest.Fatal("53300", "number of requested standby connections exceeds max_wal_senders")), Backoff, "max_wal_senders"},
		"no pg_hba line":   {refuse(pgtest.Fatal("28000", "no pg_hba.conf entry for replication connection")), Halted, "pg_hba.conf"},
		"wrong password":   {state(func(s *pgtest.State) { s.Password = "other" }, func(s *pgtest.State) { s.Password = "" }), Halted, "password"},
		"no right":         {refuse(pgtest.Fatal("42501", "must be superuser or replication role to start walsender")), Halted, "replication role"},
		"slot in use":      {slot(func(s *pgtest.Slot) { s.ActivePID = 99 }, func(s *pgtest.Slot) { s.ActivePID = 0 }), Blocked, "active for PID 99"},
		"logical slot":     {slot(func(s *pgtest.Slot) { s.Logical = true }, func(s *pgtest.Slot) { s.Logical = false }), Halted, "logical replication slot"},
		"directory locked": {lock, Blocked, "locked by another walfleet"},
		"standby":          {state(func(s *pgtest.State) { s.Standby = true }, func(s *pgtest.State) { s.Standby = false }), Backoff, "standby"},
		"standby, 13": {state(func(s *pgtest.State) { s.Standby, s.Version = true, "13.4" }, func(s *pgtest.State) { s.Standby, s.Version = false, "17" }),
			Backoff, "standby"},
		"too old": {state(func(s *pgtest.State) { s.Version = "12.20" }, func(s *pgtest.State) { s.Version = "17" }), Halted, `"12.20" is not supported`},
		"another page size": {state(func(s *pgtest.State) { s.Settings = map[string]string{"wal_block_size": "16384"} }, func(s *pgtest.State) { s.Settings = nil }),
			Halted, "wal_block_size is 16384"},
		"hostile version": {state(func(s *pgtest.State) { s.Version = "\x1b[2J9" }, func(s *pgtest.State) { s.Version = "17" }), Halted, `\\x1b[2J9`},
		"no slot, and create_slot is false": {func(g *rig) func() {
			g.srv.Do(func(s *pgtest.State) { delete(s.Slots, "walfleet") })
			g.cfg.CreateSlot = false
			return func() {
				g.srv.Do(func(s *pgtest.State) { s.Slots["walfleet"] = &pgtest.Slot{RestartLSN: origin} })
			}
		}, Halted, `"walfleet" does not exist`},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				undo := tt.cause(g)
				before := g.slot()
				g.start()
				for range 4 {
					g.sleep(13 * time.Second)
					if s := g.r.Status(); s.State == tt.state && !strings.Contains(s.Reason, tt.want) {
						t.Errorf("reason %q lacks %q", s.Reason, tt.want)
					} else if s.State != tt.state && s.State != Connecting {
						t.Errorf("state %s", s.State)
					}
				}
				g.wantFiles()
				if after := g.slot(); before == nil && after != nil || before != nil && before.RestartLSN != after.RestartLSN {
					t.Errorf("slot %+v became %+v", before, after)
				}
				if n := g.logs.count(`msg="not archiving"`) - g.logs.count(`level=DEBUG msg="not archiving"`); n != 1 {
					t.Errorf("%d lines about the same trouble:\n%s", n, g.logs.last(12))
				}
				undo()
				g.sleep(31 * time.Second)
				g.wantArchived()
			})
		})
	}
}

// A slot that someone has dropped is made again, for the server still has the WAL.
func TestDroppedSlotIsCreatedAgain(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.srv.Disconnect()
		g.srv.Do(func(s *pgtest.State) { delete(s.Slots, g.cfg.Slot) })
		g.append(10, 1000)
		g.sleep(2 * time.Second)
		g.wantArchived()
		if g.slot() == nil || g.slot().ActivePID == 0 {
			t.Errorf("slot %+v", g.slot())
		}
	})
}

func TestWALThatTheServerNoLongerHasHalts(t *testing.T) {
	for name, restart := range map[string]bool{"restart": true, "reconnect": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.start()
				g.wantArchived()
				before := g.files()
				if restart {
					g.stop()
				}
				g.srv.Disconnect()
				g.appendTo(origin + 3*mb)
				g.srv.Do(func(s *pgtest.State) { s.Oldest = origin + 2*mb })
				if restart {
					g.start()
				}
				g.sleep(5 * time.Second)
				g.want(Halted, "no longer has the WAL", "already been removed")
				if !maps.Equal(before, g.files()) {
					t.Error("the archive changed")
				}
			})
		})
	}
}

// The gap that an operator accepts is written down, and the archive goes on behind it.
func TestAcceptedGapIsRecorded(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.OnGap = GapRecord
		g.start()
		g.wantArchived()
		from := g.last().flush
		g.srv.Disconnect()
		g.appendTo(origin + 3*mb + 5000)
		g.srv.Do(func(s *pgtest.State) {
			s.Oldest = origin + 2*mb
			s.Slots[g.cfg.Slot].RestartLSN = origin + 2*mb + 700
		})
		g.mu.Lock()
		g.missing = origin + 2*mb
		g.mu.Unlock()
		g.sleep(10 * time.Second)
		g.wantArchived()
		g.wantFiles(g.name(1, 0)+".partial", g.name(1, 2), g.name(1, 3)+".partial")
		g.restart()
		g.append(3, 1000)
		g.wantArchived()
		g.stop()
		d, err := archive.Open(g.cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if gaps := d.Gaps(); len(gaps) != 1 || gaps[0].From != from || gaps[0].To != origin+2*mb || gaps[0].Timeline != 1 || !strings.Contains(gaps[0].Reason, "removed") {
			t.Errorf("gaps %+v", gaps)
		}
	})
}

// A slot that the server has invalidated retains nothing: it is made anew while the WAL is still there.
func TestInvalidatedSlotIsMadeAnew(t *testing.T) {
	for _, version := range []string{"13.4", "16.1", "17.2"} {
		for _, create := range []bool{true, false} {
			bubble(t, func(g *rig) {
				g.cfg.CreateSlot = create
				var lost atomic.Bool
				g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
					switch {
					case strings.Contains(q.SQL, "pg_replication_slots") && lost.Load():
						return g.selectSlot("lost")
					case strings.Contains(q.SQL, "pg_replication_slots"):
						return g.selectSlot("reserved")
					case strings.HasPrefix(q.SQL, "DROP_REPLICATION_SLOT"):
						lost.Store(false)
					case strings.HasPrefix(q.SQL, "START_REPLICATION") && lost.Load() && version < "17":
						return []pgproto3.BackendMessage{pgtest.Error("55000", "cannot read from replication slot")}
					}
					return nil
				}
				g.srv.Do(func(s *pgtest.State) { s.Version = version })
				g.start()
				g.wantArchived()
				g.srv.Disconnect()
				lost.Store(true)
				if version < "17" && version != "13.4" {
					g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = 0 })
				}
				g.append(5, 1000)
				g.sleep(5 * time.Second)
				if !create {
					g.want(Halted, "was invalidated, and create_slot is false")
					return
				}
				g.wantArchived()
				if lost.Load() {
					t.Error("the slot was not dropped")
				}
			})
		}
	}
}

func TestAnotherClusterIsRefusedBeforeASlotIsCreatedThere(t *testing.T) {
	for name, other := range map[string]pgtest.WALConfig{
		"system identifier": {SystemID: 4711, Size: mb, Start: origin},
		"segment size":      {SystemID: systemID, Size: 2 * mb, Start: origin},
	} {
		for _, bound := range []bool{true, false} { // to archive.json, or by segments of pg_receivewal alone
			t.Run(fmt.Sprintf("%s, bound=%v", name, bound), func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.start()
					g.wantArchived()
					g.stop()
					if !bound {
						os.Remove(filepath.Join(g.cfg.Dir, "archive.json"))
					}
					before := g.files()
					w := pgtest.NewWAL(other)
					w.Append(make([]byte, 100000))
					g.srv.Do(func(s *pgtest.State) { delete(s.Slots, g.cfg.Slot); s.Publish(w) })
					g.start()
					g.want(Halted, "the server has")
					if g.slot() != nil {
						t.Error("a slot was created on another cluster")
					}
					if !maps.Equal(before, g.files()) {
						t.Error("the archive changed")
					}
				})
			})
		}
	}
}

func TestSourceDecidesAboutStandbys(t *testing.T) {
	for source, want := range map[string]State{SourcePrimary: Backoff, SourceAny: Streaming} {
		for _, version := range []string{"13.4", "17.2"} {
			bubble(t, func(g *rig) {
				g.cfg.Source = source
				g.srv.Do(func(s *pgtest.State) { s.Standby, s.Version = true, version })
				g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
					if strings.Contains(q.SQL, "pg_replication_slots") {
						return g.selectSlot("reserved")
					}
					return nil
				}
				g.start()
				g.want(want)
			})
		}
	}
}

func TestStopIsCleanAndBounded(t *testing.T) {
	block := func(on string) func(g *rig) {
		return func(g *rig) {
			never := make(chan struct{})
			g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
				if strings.HasPrefix(q.SQL, on) {
					<-never
				}
				return nil
			}
			g.Cleanup(func() { close(never) })
			g.start()
		}
	}
	for name, tt := range map[string]struct {
		until func(g *rig)
		bye   bool          // says CopyDone, after a last status
		bound time.Duration // to stop in
	}{
		"idle": {func(g *rig) { g.start(); g.wantArchived(); g.sleep(5 * time.Second) }, true, 0},
		"catching up": {func(g *rig) {
			g.appendTo(origin + 900<<10)
			g.serve(func(st *pgtest.Stream) {
				for pos := origin; !st.Ended().CopyDone; pos += 8 << 10 {
					if st.Send(pos, g.wal.End(), g.wal.Bytes(pos, pos+8<<10)) != nil {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				_ = st.End()
			})
			g.start()
			g.sleep(300 * time.Millisecond)
			g.want(CatchingUp)
		}, true, time.Second},
		"asynchronous": {func(g *rig) { g.cfg.Synchronous, g.cfg.FlushInterval = false, time.Hour; g.start(); g.append(3, 100) }, true, 0},
		"server that never answers": {func(g *rig) {
			g.serve(func(st *pgtest.Stream) {
				_ = st.Send(origin, g.wal.End(), g.wal.Bytes(origin, g.wal.End()))
				<-st.Gone()
			})
			g.start()
		}, true, stopTimeout + time.Second},
		"server that no longer reads": {func(g *rig) {
			deaf := make(chan struct{})
			g.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				server, err := g.srv.Dial(ctx, network, address)
				if err != nil {
					return nil, err
				}
				client, proxy := net.Pipe()
				go func() {
					defer proxy.Close()
					_, _ = io.Copy(proxy, server)
				}()
				go func() {
					defer server.Close()
					p := make([]byte, 1000)
					for {
						select {
						case <-deaf:
							return
						default:
						}
						n, err := proxy.Read(p)
						select {
						case <-deaf: // and what was read is lost
							<-g.Context().Done()
							return
						default:
						}
						if _, werr := server.Write(p[:n]); err != nil || werr != nil {
							return
						}
					}
				}()
				return client, nil
			}
			g.start()
			g.wantArchived()
			close(deaf)
			g.append(3, 1000)
			g.sleep(time.Second)
		}, false, stopTimeout + time.Second},
		"dialling": {func(g *rig) {
			g.dial = func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
			g.start()
		}, false, 0},
		"server that does not greet": {func(g *rig) {
			g.dial = func(context.Context, string, string) (net.Conn, error) {
				client, server := net.Pipe()
				go io.Copy(io.Discard, server)
				return client, nil
			}
			g.start()
		}, false, time.Second},
		"identifying":         {block("IDENTIFY_SYSTEM"), false, time.Second},
		"reading the slot":    {block("READ_REPLICATION_SLOT"), false, time.Second},
		"starting the stream": {block("START_REPLICATION"), false, time.Second},
		"backing off": {func(g *rig) {
			g.srv.Do(func(s *pgtest.State) { s.DialError = errors.New("no") })
			g.start()
			g.sleep(time.Minute)
		}, false, 0},
		"halted": {func(g *rig) { g.srv.Do(func(s *pgtest.State) { s.Version = "9.6" }); g.start(); g.want(Halted) }, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				tt.until(g)
				begun := time.Now()
				if g.updates(); tt.bye {
					g.sent = nil
				}
				g.stop() // Run returns nil, within a bound
				if took := time.Since(begun); took > tt.bound {
					t.Errorf("stopping took %s, more than %s", took, tt.bound)
				}
				if !tt.bye {
					return
				}
				s, u := g.r.Status(), g.last()
				if u.write != s.Written || u.flush != s.Flushed || s.Flushed == 0 || u.at.Before(begun) {
					t.Errorf("last status %+v, status %+v", u, s)
				}
				if !g.stream().Ended().CopyDone {
					t.Error("no CopyDone")
				}
			})
		})
	}
}

func TestDirectoryIsFreeAfterStop(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.stop()
		d, err := archive.Open(g.cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	})
}

// Whoever mends a halted cluster may have to move its directory away.
func TestHaltedClusterLetsGoOfItsDirectory(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.Do(func(s *pgtest.State) { s.Version = "9.6" })
		g.start()
		g.want(Halted)
		d, err := archive.Open(g.cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		g.srv.Do(func(s *pgtest.State) { s.Version = "17" })
		g.sleep(haltedRetry)
		g.wantArchived()
	})
}

// panics is a log that panics once, at a line that holds words.
type panics struct {
	*logs
	words string
}

func (p *panics) Write(b []byte) (int, error) {
	if p.words != "" && strings.Contains(string(b), p.words) {
		p.words = ""
		panic("as a test wants it")
	}
	return p.logs.Write(b)
}

func TestPanicIsAFailureLikeAnyOther(t *testing.T) {
	for _, words := range []string{"msg=connected", `msg="streaming started"`, `msg="caught up`} {
		bubble(t, func(g *rig) {
			g.logTo = &panics{g.logs, words}
			g.start()
			g.want(Backoff, "panic: as a test wants it")
			g.append(5, 1000)
			g.sleep(2 * time.Second)
			g.wantArchived()
			if n := g.r.Status().Panics; n != 1 {
				t.Errorf("%d panics counted", n)
			}
			if g.logs.count("this is a bug in walfleet") != 1 {
				t.Errorf("the log does not tell:\n%s", g.logs.last(12))
			}
		})
	}
}

func TestSecretsAreNeverShown(t *testing.T) {
	const secret = "hunter2 very 'secret"
	for name, conninfo := range map[string]string{
		"keywords":       `host=db user=archiver sslmode=disable password='hunter2 very \'secret'`,
		"URI":            "postgres://archiver:hunter2%20very%20%27secret@db/x?sslmode=disable",
		"not quoted":     `host=db user=archiver sslmode=disable password=hunter2 very 'secret`,
		"does not parse": `host=db port=what password='hunter2 very \'secret'`,
		"broken URI":     "postgres://archiver:hunter2 very %27secret@db:port/x",
		"password_file":  "host=db user=archiver sslmode=disable",
	} {
		for _, right := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.cfg.Conninfo = conninfo
					if name == "password_file" {
						g.cfg.PasswordFile = filepath.Join(t.TempDir(), "password")
						if err := os.WriteFile(g.cfg.PasswordFile, []byte(secret+"\nnot this\n"), 0o600); err != nil {
							t.Fatal(err)
						}
					}
					g.srv.Do(func(s *pgtest.State) {
						if s.Password = secret; !right {
							s.Password = "other"
						}
					})
					g.start()
					ok := g.r.Status().State == Streaming
					if parses := !strings.Contains(name, " ") && !strings.Contains(name, "broken"); ok != (right && parses) {
						t.Errorf("state %s: %s", g.r.Status().State, g.r.Status().Reason)
					}
					g.sleep(time.Minute)
					g.srv.Disconnect()
					g.sleep(time.Minute)
					status := fmt.Sprintf("%+v", g.r.Status())
					g.stop()
					for _, s := range []string{status, g.logs.String()} {
						for _, part := range []string{"hunter2", "very", "secret"} {
							if strings.Contains(s, part) {
								t.Errorf("%q is shown: %s", part, s)
							}
						}
					}
				})
			})
		}
	}
}

func TestApplicationName(t *testing.T) {
	for _, tt := range []struct{ setting, conninfo, env, want string }{
		{"", "", "", "walfleet"},
		{"", "", "from_env", "from_env"},
		{"", " application_name=from_conninfo", "from_env", "from_conninfo"},
		{"own", " application_name=from_conninfo", "from_env", "own"},
	} {
		t.Setenv("PGAPPNAME", tt.env)
		bubble(t, func(g *rig) {
			g.cfg.ApplicationName, g.cfg.Conninfo = tt.setting, g.cfg.Conninfo+tt.conninfo
			g.start()
			if p := g.stream().Startup(); p["application_name"] != tt.want || p["replication"] != "true" {
				t.Errorf("%+v: %v", tt, p)
			}
		})
	}
}

func TestPolarDBIsRecognised(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.Do(func(s *pgtest.State) { s.Settings = map[string]string{"polar_version": "2.0.15.2.0\x07"} })
		g.start()
		g.wantArchived()
		if s := g.r.Status(); s.PolarDB != `2.0.15.2.0\a` || s.ServerVersion != "17.2" || s.SystemID != systemID || s.SegmentSize != mb {
			t.Errorf("%+v", s)
		}
	})
}

func TestBackoffGrowsUntilASessionWasSustained(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		again := func() time.Duration {
			begun, n := time.Now(), len(g.srv.Streams())
			g.srv.Disconnect()
			for len(g.srv.Streams()) == n {
				g.sleep(10 * time.Millisecond)
			}
			return time.Since(begun)
		}
		var total time.Duration
		for range 30 {
			total += again()
		}
		if total < time.Minute || total > 30*30*time.Second {
			t.Errorf("30 reconnects took %s", total)
		}
		for range 3 {
			g.sleep(sustained + time.Second)
			if d := again(); d > 1100*time.Millisecond {
				t.Errorf("waited %s after a sustained session", d)
			}
		}
	})
}

// allOf is progress with n everywhere.
func allOf(n int64) progress {
	return progress{wal.Timeline(n), wal.LSN(n), wal.LSN(n), wal.LSN(n), wal.LSN(n), n, n, n, n, n, n, n, [2]mark{{n, n}, {n, n}}}
}

// Readers see one consistent snapshot, without a lock. Run it with -race.
func TestProgressIsNeverTorn(t *testing.T) {
	var c progressCell
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			last := int64(0)
			for {
				p := c.load()
				n := p.received
				if want := allOf(n); p != want || n < last {
					t.Errorf("torn: %+v after %d", p, last)
					return
				}
				last = n
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for n := int64(1); n <= 200000; n++ {
		c.store(allOf(n))
	}
	close(stop)
	wg.Wait()
}
