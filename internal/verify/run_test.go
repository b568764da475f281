package verify_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/verify"
	"github.com/walfleet/walfleet/internal/wal"
)

// A hole that is recorded as a gap is none, nor is what pruning took from the beginning.
func TestGapsAndBeginnings(t *testing.T) {
	s := newSource(systemID)
	for name, do := range map[string]func(dir string){
		"gap": func(dir string) {
			addGap(t, dir, 1, "0/310000", "0/500000")
			move(t, dir, name(1, 3), name(1, 3)+".partial")
			remove(t, dir, name(1, 4))
		},
		"gap at a segment's start": func(dir string) {
			addGap(t, dir, 1, "0/400000", "0/500000")
			remove(t, dir, name(1, 4))
		},
		"gap before the new timeline": func(dir string) {
			addGap(t, dir, 2, "0/510000", "0/600000")
			move(t, dir, name(1, 5), name(1, 5)+".partial")
			remove(t, dir, name(1, 6)+".partial")
		},
		"the oldest are gone": func(dir string) {
			for n := wal.LSN(1); n <= 5; n++ {
				remove(t, dir, name(1, n))
			}
		},
		"pruned, and some are left": func(dir string) {
			m := meta(t, dir)
			m["pruned"] = map[string]any{"lsn": "0/500000", "time": time.Now()}
			setMeta(t, dir, m)
			remove(t, dir, name(1, 2))
			remove(t, dir, name(1, 4))
		},
		"a divergence was accepted": func(dir string) {
			m := meta(t, dir)
			m["divergences"] = []any{map[string]any{"timeline": 1, "lsn": "0/500000", "restart": "0/500000", "kept": []any{}, "time": time.Now(), "reason": "ends"}}
			setMeta(t, dir, m)
			other := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Start: 5 * size})
			other.FillTo(6 * size)
			writeSegment(t, dir, other, 1, 5, false)
			for _, file := range []string{name(1, 6) + ".partial", name(2, 6), name(2, 7), name(2, 8) + ".partial", "00000002.history"} {
				remove(t, dir, file)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := archiveOf(t, s)
			do(dir)
			if r := run(t, dir, verify.Options{}); !r.Whole {
				t.Errorf("faults:\n%s", found(r))
			}
		})
	}
}

// Where the archive begins inside a record, that part is said to be unproven, and so is one that it ends in.
func TestUnproven(t *testing.T) {
	s := newSource(systemID)
	dir := archiveOf(t, s)
	for _, file := range []string{name(1, 1), name(1, 4), name(1, 5), name(1, 6) + ".partial", name(2, 6), name(2, 7), name(2, 8) + ".partial", "00000002.history"} {
		remove(t, dir, file)
	}
	r := run(t, dir, verify.Options{})
	var got []string
	for _, u := range r.Unproven {
		got = append(got, u.File+" "+u.LSN+"-"+u.End)
	}
	if want := []string{name(1, 2) + " 0/200000-0/300000", name(1, 3) + " 0/300000-0/400000"}; !r.Whole || !slices.Equal(got, want) {
		t.Errorf("unproven: %q, want %q; faults:\n%s", got, want, found(r))
	}

	dir = archiveOf(t, s)
	for _, file := range []string{name(1, 2), name(1, 3), name(1, 4), name(1, 5), name(1, 6) + ".partial", name(2, 6), name(2, 7), name(2, 8) + ".partial", "00000002.history"} {
		remove(t, dir, file)
	}
	r = run(t, dir, verify.Options{})
	if !r.Whole || len(r.Unproven) != 1 || r.Unproven[0].LSN != crossing(s).String() || r.Unproven[0].End != "0/200000" {
		t.Errorf("unproven: %+v; faults:\n%s", r.Unproven, found(r))
	}
	// The record goes on in a partial file: that proves it, once it is all there.
	put(t, dir, name(1, 2)+".partial", s.one.Bytes(2*size, 3*size))
	if r = run(t, dir, verify.Options{}); !r.Whole || len(r.Unproven) != 1 {
		t.Errorf("unproven: %+v; faults:\n%s", r.Unproven, found(r))
	}
}

// A flipped bit in a record that crosses into the partial segment is found when a record follows there.
func TestRecordThatGoesOnInPartial(t *testing.T) {
	w := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID})
	w.FillTo(2*size - 1000)
	crossing, _ := w.Append(make([]byte, 3000))
	dir := archiveOf(t, source{one: w, two: w, fork: 6 * size})
	for _, file := range []string{name(1, 3), name(1, 4), name(1, 5), name(1, 6) + ".partial", name(2, 6), name(2, 7), name(2, 8) + ".partial", "00000002.history"} {
		remove(t, dir, file)
	}
	move(t, dir, name(1, 2), name(1, 2)+".partial")
	if r := run(t, dir, verify.Options{}); !r.Whole || len(r.Unproven) != 0 {
		t.Fatalf("unproven: %+v; faults:\n%s", r.Unproven, found(r))
	}
	flip(t, dir, name(1, 1), size-10, 1)
	if r := run(t, dir, verify.Options{}); !r.Whole || len(r.Unproven) != 1 {
		t.Errorf("nothing follows the record, so it may not be complete: %+v; faults:\n%s", r.Unproven, found(r))
	}
	w.Append([]byte("it was complete"))
	put(t, dir, name(1, 2)+".partial", w.Bytes(2*size, 3*size))
	if r := run(t, dir, verify.Options{}); len(r.Faults) != 1 || r.Faults[0].Kind != verify.Checksum || r.Faults[0].LSN != crossing.String() {
		t.Errorf("faults:\n%s", found(r))
	}
}

// The archive may be written, compressed and pruned while it is verified.
func TestArchiveThatChanges(t *testing.T) {
	s := newSource(systemID)
	for range 20 {
		dir := archiveOf(t, s)
		var once sync.Once
		r, err := verify.Run(t.Context(), dir, verify.Options{Jobs: 1, Progress: func(int64, int64) {
			once.Do(func() { // the first segment was read
				remove(t, dir, name(1, 1))
				compress(t, dir, name(1, 3), ".gz")
				compress(t, dir, name(1, 4), ".zst")
				move(t, dir, name(2, 8)+".partial", name(2, 8))
				put(t, dir, name(2, 9)+".partial", make([]byte, size))
			})
		}})
		if err != nil || !r.Whole {
			t.Fatalf("%v, faults:\n%s", err, found(r))
		}
	}
}

// An interrupted run says what it has not checked, and with Resume the next one checks that alone; the one after
// it begins anew.
func TestInterruptAndResume(t *testing.T) {
	s := newSource(systemID)
	dir := archiveOf(t, s)
	state := filepath.Join(t.TempDir(), "state")
	ctx, cancel := context.WithCancel(t.Context())
	var read int
	r, err := verify.Run(ctx, dir, verify.Options{Resume: state, Progress: func(int64, int64) {
		if read++; read == 3 {
			cancel()
		}
	}})
	if err != nil || r.Whole || len(r.Faults) > 0 || len(r.NotChecked) == 0 {
		t.Fatalf("%v, %+v", err, r)
	}
	if !strings.Contains(strings.Join(r.NotChecked, " "), " to "+name(1, 6)) {
		t.Errorf("not checked: %q", r.NotChecked)
	}
	flip(t, dir, name(1, 1), 50000, 1) // it keeps its size, but not its time
	r = run(t, dir, verify.Options{Resume: state})
	if len(r.Faults) != 1 {
		t.Errorf("a segment that was changed is not checked again:\n%s", found(r))
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a run that is complete leaves the file: %v", err)
	}

	flip(t, dir, name(1, 1), 50000, 1)
	ctx, cancel = context.WithCancel(t.Context())
	read = 0
	if _, err := verify.Run(ctx, dir, verify.Options{Resume: state, Progress: func(int64, int64) {
		if read++; read == 4 {
			cancel()
		}
	}}); err != nil {
		t.Fatal(err)
	}
	r = run(t, dir, verify.Options{Resume: state})
	if !r.Whole || r.Skipped == 0 || r.Segments+r.Skipped != 7 {
		t.Errorf("%d checked, %d skipped; faults:\n%s", r.Segments, r.Skipped, found(r))
	}
	put(t, filepath.Dir(state), "state", []byte(`{"archive": "/elsewhere"}`))
	if _, err := verify.Run(t.Context(), dir, verify.Options{Resume: state}); err == nil || !strings.Contains(err.Error(), "another archive") {
		t.Errorf("with another archive's file: %v", err)
	}
}

func TestSince(t *testing.T) {
	s := newSource(systemID)
	dir := archiveOf(t, s)
	if r := run(t, dir, verify.Options{From: 5*size + 1}); !r.Whole || r.Segments != 3 || r.Skipped != 4 {
		t.Errorf("%d checked, %d skipped; faults:\n%s", r.Segments, r.Skipped, found(r))
	}
	old := time.Now().Add(-time.Hour)
	for n := wal.LSN(1); n <= 3; n++ {
		if err := os.Chtimes(filepath.Join(dir, name(1, n)), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if r := run(t, dir, verify.Options{Since: old.Add(time.Minute)}); !r.Whole || r.Segments != 4 || r.Skipped != 3 {
		t.Errorf("%d checked, %d skipped; faults:\n%s", r.Segments, r.Skipped, found(r))
	}
}

func TestMaxRate(t *testing.T) {
	dir := archiveOf(t, newSource(systemID))
	begin := time.Now()
	if r := run(t, dir, verify.Options{MaxRate: 20 << 20}); !r.Whole {
		t.Error(found(r))
	}
	if took := time.Since(begin); took < 200*time.Millisecond { // 7 MB and a burst of 1 MB
		t.Errorf("it took %s", took)
	}
}

func TestNothingThere(t *testing.T) {
	if _, err := verify.Run(t.Context(), filepath.Join(t.TempDir(), "none"), verify.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := verify.Run(t.Context(), t.TempDir(), verify.Options{}); err == nil || !strings.Contains(err.Error(), "not mounted") {
		t.Errorf("an empty directory: %v", err)
	}
}

// serve gives a scripted server's conninfo.
func serve(t *testing.T, state pgtest.State) (*pgtest.Server, string) {
	t.Helper()
	server := pgtest.NewServer(t, state)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			server.Accept(conn)
		}
	}()
	return server, fmt.Sprintf("host=127.0.0.1 port=%d user=u sslmode=disable", l.Addr().(*net.TCPAddr).Port)
}

func TestAgainst(t *testing.T) {
	s := newSource(systemID)
	history := map[wal.Timeline][]byte{2: fmt.Appendf(nil, "1\t%s\n", s.fork)}
	state := func() pgtest.State {
		return pgtest.State{SystemID: systemID, SegmentSize: size, Timeline: 2, Histories: history}
	}
	publish := func(server *pgtest.Server) { server.Publish(s.one); server.Publish(s.two) }
	o := verify.Options{Timeout: 10 * time.Second}

	dir := archiveOf(t, s)
	server, conninfo := serve(t, state())
	publish(server)
	o.Against = conninfo
	r := run(t, dir, o)
	want := []verify.Compared{{Timeline: 1, From: "0/100000", To: s.fork.String()}, {Timeline: 2, From: "0/600000", To: s.two.End().String()}}
	if !r.Whole || !slices.Equal(r.Compared, want) {
		t.Errorf("compared %v, want %v; %s\n%s", r.Compared, want, r.Error, found(r))
	}
	if got := server.Streams()[0].Request(); got.Slot != "" {
		t.Errorf("the slot %q was used", got.Slot)
	}

	server.Do(func(st *pgtest.State) { st.Oldest = 4*size + 1000 })
	r = run(t, dir, o)
	if !r.Whole || len(r.Compared) != 2 || r.Compared[0].From != "0/400000" {
		t.Errorf("compared %v, the server's oldest WAL is in 0/400000; %s\n%s", r.Compared, r.Error, found(r))
	}

	// WAL that is well-formed, and not the server's.
	other := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Start: 4 * size})
	other.FillTo(9 * size)
	lonely := t.TempDir()
	for n := wal.LSN(4); n <= 5; n++ {
		writeSegment(t, lonely, other, 1, n, false)
	}
	put(t, lonely, "archive.json", get(t, dir, "archive.json"))
	r = run(t, lonely, o)
	if len(r.Faults) != 1 || r.Faults[0].Kind != verify.Differs || r.Faults[0].File != name(1, 4) || r.Faults[0].Offset != 2 {
		t.Errorf("%s\n%s", r.Error, found(r))
	}

	server.Do(func(st *pgtest.State) { st.Oldest = 8 * size })
	for n := wal.LSN(8); n <= 8; n++ {
		remove(t, dir, name(2, n)+".partial")
	}
	if r = run(t, dir, o); r.Whole || !strings.Contains(r.Error, "any more") {
		t.Errorf("a server without the archive's WAL: %q", r.Error)
	}
	_, o.Against = serve(t, pgtest.State{SystemID: 1, SegmentSize: size})
	if r = run(t, dir, o); r.Whole || !strings.Contains(r.Error, "another cluster") {
		t.Errorf("another cluster: %q", r.Error)
	}
	o.Against = "host=127.0.0.1 port=1 user=u sslmode=disable"
	if r = run(t, dir, o); r.Whole || r.Error == "" || len(r.Faults) > 0 {
		t.Errorf("no server: %q", r.Error)
	}
}

// docs/json.md has every name of the report in its section, and every kind of fault is in docs/recovery.md.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "## `walfleet verify")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("docs/json.md has no section for verify")
	}
	var note func(reflect.Type)
	note = func(typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if !f.IsExported() {
				continue
			}
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !strings.Contains(section, "`"+name+"`") {
				t.Errorf("%v.%s: %q is not documented", typ, f.Name, name)
			}
			if f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct {
				note(f.Type.Elem())
			}
		}
	}
	note(reflect.TypeFor[verify.Report]())
	recovery, err := os.ReadFile("../../docs/recovery.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range verify.Kinds() {
		if !strings.Contains(string(recovery), "`"+string(kind)+"`") {
			t.Errorf("docs/recovery.md does not explain the kind %s", kind)
		}
	}
}

func BenchmarkPlain(b *testing.B) {
	const big = 16 << 20
	w := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: big})
	payload := make([]byte, 100)
	for w.End() < 9*big {
		w.Append(payload)
	}
	dir := b.TempDir()
	for n := wal.LSN(1); n <= 8; n++ {
		put(b, dir, wal.Segment{Timeline: 1, Start: n * big, Size: big}.Name(), w.Bytes(n*big, (n+1)*big))
	}
	put(b, dir, "archive.json", fmt.Appendf(nil, `{"format": 1, "system_identifier": "%d", "segment_size": %d,
		"origin": {"timeline": 1, "lsn": "0/1000000", "source": "slot", "time": "2026-01-31T09:30:00Z"}}`, uint64(systemID), big))
	b.SetBytes(8 * big)
	for b.Loop() {
		r, err := verify.Run(b.Context(), dir, verify.Options{Jobs: 1})
		if err != nil || !r.Whole {
			b.Fatal(err, found(r))
		}
	}
}

// A link whose target is away, on a disk that is not mounted, has no byte that could be whole.
func TestLinkToNowhere(t *testing.T) {
	dir := archiveOf(t, newSource(systemID))
	remove(t, dir, name(1, 3))
	if err := os.Symlink(filepath.Join(dir, "away", name(1, 3)), filepath.Join(dir, name(1, 3))); err != nil {
		t.Fatal(err)
	}
	if r := run(t, dir, verify.Options{}); r.Whole || len(r.Faults) != 1 || r.Faults[0].Kind != verify.Unreadable || r.Faults[0].File != name(1, 3) {
		t.Errorf("whole: %v, faults:\n%s", r.Whole, found(r))
	}
}

// The length of the record that goes on in a partial file is known there, too.
func TestLengthOfRecordThatGoesOnInPartial(t *testing.T) {
	dir := archiveOf(t, newSource(systemID))
	flip(t, dir, name(2, 7), 1046467, 0x04) // the length's highest byte
	if r := run(t, dir, verify.Options{}); len(r.Faults) != 1 {
		t.Errorf("faults:\n%s", found(r))
	}
}
