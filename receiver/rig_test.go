package receiver

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	systemID = 7000000000000000042
	mb       = 1 << 20
	origin   = wal.LSN(64 * mb) // where the servers' WAL begins, and with it most archives
)

// rig is a receiver and the scripted server that it archives, in a bubble of virtual time. It holds the
// receiver to DESIGN's promises 1 and 3 whatever a test does: every status update is judged in the moment in
// which it is sent, by what is on disk then, and every file in the end.
type rig struct {
	*testing.T
	srv  *pgtest.Server
	size wal.SegmentSize
	wal  *pgtest.WAL // of the current timeline; publish makes it the server's
	cfg  Config
	logs *logs
	dial func(ctx context.Context, network, address string) (net.Conn, error) // nil: srv.Dial
	busy atomic.Bool                                                          // more always waits in the socket
	room atomic.Int64                                                         // free bytes of the archive's file system; 0: enough
	hang atomic.Pointer[chan struct{}]                                        // what the file system waits for; nil: nothing

	logTo  io.Writer // nil: logs
	shared *Shared

	r      *Receiver
	cancel context.CancelFunc
	ended  chan error

	mu       sync.Mutex
	truth    map[wal.Timeline]image
	judged   map[wal.Timeline]wal.LSN // what is on disk was compared up to here
	missing  wal.LSN                  // what is before it was given up
	acked    wal.LSN                  // the highest flush position of any status update
	goesBack bool                     // the test makes acknowledged WAL of an old timeline worthless
	sent     []update
	switched []wal.LSN            // ends of XLOG_SWITCH records
	onStream func(*pgtest.Stream) // nil: (*pgtest.Stream).Serve
}

// image is the WAL of one timeline as the server has had it.
type image struct {
	bytes []byte // from origin
	ends  []wal.LSN
}

// update is a status update as it left the receiver.
type update struct {
	write, flush wal.LSN
	ask          bool
	at           time.Time
}

// bubble runs f with a server that has some records and a slot before them, and an empty archive.
func bubble(t *testing.T, f func(g *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, mb)
		ended := make(chan struct{})
		go func() { // a test that fails ends here, and is cleaned up in the bubble
			defer close(ended)
			f(g)
			g.stop()
			g.judgeFiles()
		}()
		<-ended
	})
}

func newRig(t *testing.T, size wal.SegmentSize) *rig {
	g := &rig{
		T: t, size: size, shared: NewShared(1, 1), wal: newWAL(size), logs: &logs{},
		srv:   pgtest.NewServer(t, pgtest.State{Slots: map[string]*pgtest.Slot{"walfleet": {RestartLSN: origin}}}),
		truth: map[wal.Timeline]image{}, judged: map[wal.Timeline]wal.LSN{},
		cfg: Config{
			Name: "blue", Dir: filepath.Join(t.TempDir(), "blue"), Conninfo: "host=db user=archiver sslmode=disable", Slot: "walfleet",
			CreateSlot: true, Synchronous: true, Source: SourcePrimary,
			Adjustable: Adjustable{OnGap: GapHalt, StatusInterval: 10 * time.Second, ReceiveTimeout: 60 * time.Second, FlushInterval: 5 * time.Second},
		},
	}
	g.srv.OnStream = func(st *pgtest.Stream) {
		g.mu.Lock()
		f := g.onStream
		g.mu.Unlock()
		if f == nil {
			f = (*pgtest.Stream).Serve
		}
		f(st)
	}
	g.append(3, 500)
	return g
}

func newWAL(size wal.SegmentSize) *pgtest.WAL {
	return pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: size, Start: origin})
}

// append adds n records with payloads of size bytes, all different, and publishes them.
func (g *rig) append(n, size int) {
	for range n {
		payload := make([]byte, size)
		for i := 0; i+8 <= size; i += 8 {
			binary.LittleEndian.PutUint64(payload[i:], uint64(g.wal.End())*0x9E3779B97F4A7C15+uint64(i))
		}
		g.wal.Append(payload)
	}
	g.publish(1)
}

// appendTo adds records up to end, a multiple of 8.
func (g *rig) appendTo(end wal.LSN) {
	for g.wal.End()+12<<10 < end {
		g.wal.Append(make([]byte, 8000))
	}
	g.wal.FillTo(end)
	g.publish(1)
}

// serve decides what the server does with streams from now on.
func (g *rig) serve(f func(*pgtest.Stream)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.onStream = f
}

// switchSegment adds an XLOG_SWITCH record, and the rest of its segment.
func (g *rig) switchSegment() {
	g.mu.Lock()
	g.switched = append(g.switched, g.wal.End()+24)
	g.mu.Unlock()
	g.wal.Switch()
	g.publish(1)
}

// publish gives the server what g.wal has, of timeline tli or its own when that is 1.
func (g *rig) publish(tli wal.Timeline) { g.publishTo(tli, g.wal.End()) }

// publishTo lets the server have g.wal up to end alone.
func (g *rig) publishTo(tli wal.Timeline, end wal.LSN) {
	if tli == 1 {
		g.srv.Do(func(s *pgtest.State) { tli = s.Timeline })
	}
	g.know(tli, g.wal)
	g.srv.Do(func(s *pgtest.State) {
		s.Publish(g.wal)
		s.WALEnd = end
	})
}

// know makes w the truth about timeline tli.
func (g *rig) know(tli wal.Timeline, w *pgtest.WAL) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.truth[tli] = image{w.Bytes(origin, w.End()), w.Boundaries()}
}

// promote makes the server go on with a new timeline that forks off at at, and has n records of its own.
func (g *rig) promote(tli wal.Timeline, at wal.LSN, n int) {
	g.wal = g.wal.Fork(at, tli)
	for i := range n {
		g.wal.Append(bytes.Repeat([]byte{byte(tli), byte(i)}, 2500))
	}
	g.know(tli, g.wal)
	g.srv.Do(func(s *pgtest.State) { s.Promote(g.wal, at) })
}

// start runs a new receiver, as a daemon that is started does.
func (g *rig) start() {
	g.Helper()
	g.make()
	g.run(g.r.Run)
}

// run runs f in the background, with a context that stop ends.
func (g *rig) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(g.Context())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	g.cancel, g.ended = cancel, ended
	g.Cleanup(cancel)
	synctest.Wait()
}

// make makes a new receiver.
func (g *rig) make() {
	g.Helper()
	if g.dial == nil {
		g.dial = g.srv.Dial
	}
	if g.logTo == nil {
		g.logTo = g.logs
	}
	r := New(g.cfg, slog.New(slog.NewTextHandler(g.logTo, &slog.HandlerOptions{Level: slog.LevelDebug})), g.shared)
	r.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		g.mu.Lock()
		dial := g.dial
		g.mu.Unlock()
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &watched{c, g, r}, nil
	}
	r.free = func() (int64, error) {
		if goOn := g.hang.Load(); goOn != nil {
			<-*goOn
		}
		return cmp.Or(g.room.Load(), 1<<40), nil
	}
	g.mu.Lock()
	clear(g.judged)
	g.mu.Unlock()
	g.r = r
}

// stop stops the receiver, if it runs, and expects it to end well and soon.
func (g *rig) stop() {
	g.Helper()
	if g.cancel == nil {
		return
	}
	begun := time.Now()
	g.cancel()
	if err := <-g.ended; err != nil {
		g.Errorf("Run: %v", err)
	}
	g.cancel = nil
	if took := time.Since(begun); took > stopTimeout+time.Second {
		g.Errorf("stopping took %s", took)
	}
	if s := g.r.Status(); s.State != Stopped {
		g.Errorf("state %s after Run", s.State)
	}
}

// restart stops the receiver and starts another one.
func (g *rig) restart() {
	g.Helper()
	g.stop()
	g.start()
}

// sleep lets virtual time pass, and everything come to rest.
func (g *rig) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// want expects a state, and words in its reason.
func (g *rig) want(state State, words ...string) {
	g.Helper()
	synctest.Wait()
	s := g.r.Status()
	if s.State != state {
		g.Fatalf("state %s (%s), want %s\n%s", s.State, s.Reason, state, g.logs.last(12))
	}
	for _, w := range words {
		if !strings.Contains(s.Reason, w) {
			g.Errorf("reason %q lacks %q", s.Reason, w)
		}
	}
}

// wantArchived expects everything that the server has to be archived and acknowledged.
func (g *rig) wantArchived() {
	g.Helper()
	g.want(Streaming)
	end := g.wal.End()
	s, u := g.r.Status(), g.last()
	if s.Written != end || s.Flushed != end || s.Lag() != 0 {
		g.Errorf("written %s, flushed %s, want %s", s.Written, s.Flushed, end)
	}
	if u.flush != end || u.write != end {
		g.Errorf("last update: %+v, want %s", u, end)
	}
}

// last is the last status update.
func (g *rig) last() update {
	g.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.sent) == 0 {
		g.Fatalf("no status update was sent\n%s", g.logs.last(12))
	}
	return g.sent[len(g.sent)-1]
}

// updates forgets and returns the status updates so far.
func (g *rig) updates() []update {
	g.mu.Lock()
	defer g.mu.Unlock()
	sent := g.sent
	g.sent = nil
	return sent
}

// stream is the server's last stream.
func (g *rig) stream() *pgtest.Stream {
	g.Helper()
	all := g.srv.Streams()
	if len(all) == 0 {
		g.Fatalf("no stream was started\n%s", g.logs.last(12))
	}
	return all[len(all)-1]
}

// slot is the server's slot; nil when there is none.
func (g *rig) slot() (slot *pgtest.Slot) {
	g.srv.Do(func(s *pgtest.State) {
		if have := s.Slots[g.cfg.Slot]; have != nil {
			c := *have
			slot = &c
		}
	})
	return slot
}

// files are the archive's files and digests of their contents.
func (g *rig) files() map[string]string {
	files := map[string]string{}
	entries, err := os.ReadDir(g.cfg.Dir)
	if err != nil && !os.IsNotExist(err) {
		g.Error(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			continue // a test's own
		}
		data, err := os.ReadFile(filepath.Join(g.cfg.Dir, e.Name()))
		if err != nil {
			g.Error(err)
		}
		files[e.Name()] = fmt.Sprintf("%d bytes, %x", len(data), sha256.Sum256(data))
	}
	return files
}

// wantFiles expects the segments of the archive, with their suffixes, and no others.
func (g *rig) wantFiles(names ...string) {
	g.Helper()
	var have []string
	for _, name := range slices.Sorted(maps.Keys(g.files())) {
		if len(name) >= 24 && name != "archive.json" {
			have = append(have, name)
		}
	}
	if !slices.Equal(have, names) {
		g.Errorf("segments %q, want %q", have, names)
	}
}

// name is the file name of the segment that begins n segments after origin.
func (g *rig) name(tli wal.Timeline, n int) string {
	return g.size.Segment(tli, origin+wal.LSN(n)*wal.LSN(g.size)).Name()
}

// watched is the receiver's end of a connection.
type watched struct {
	net.Conn
	g *rig
	r *Receiver
}

// Write sees every message in the receiver's own goroutine, so that nothing moves meanwhile.
func (c *watched) Write(p []byte) (int, error) {
	if len(p) == 39 && p[0] == 'd' && p[5] == 'r' {
		lsn := func(i int) wal.LSN { return wal.LSN(binary.BigEndian.Uint64(p[i:])) }
		if apply := lsn(22); apply != 0 {
			c.g.Errorf("apply position %s", apply)
		}
		c.g.judge(c.r, update{lsn(6), lsn(14), p[38] == 1, time.Now()})
	}
	return c.Conn.Write(p)
}

// SyscallConn stands for the socket that a net.Pipe does not have, so that busy can decide what waits in it.
func (c *watched) SyscallConn() (syscall.RawConn, error) { return queue{g: c.g}, nil }

type queue struct {
	syscall.RawConn
	g *rig
}

func (q queue) Control(f func(fd uintptr)) error {
	if !q.g.busy.Load() {
		f(^uintptr(0)) // no file, and nothing in it
		return nil
	}
	r, w, err := os.Pipe()
	if err == nil {
		defer r.Close()
		defer w.Close()
		_, err = w.Write([]byte("more"))
		f(r.Fd())
	}
	return err
}

// judge holds a status update to promise 1.
func (g *rig) judge(r *Receiver, u update) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sent = append(g.sent, u)
	tli := r.writer.Timeline()
	truth := g.truth[tli]
	if end := origin + wal.LSN(len(truth.bytes)); u.write > end {
		g.Errorf("write %s was never sent, timeline %d ends at %s", u.write, tli, end)
	}
	if u.flush == 0 {
		return
	}
	if u.flush > u.write {
		g.Errorf("flush %s above write %s", u.flush, u.write)
	}
	if durable := r.writer.Durable(); u.flush > durable {
		g.Errorf("flush %s, but durable is %s", u.flush, durable)
	}
	if !slices.Contains(slices.Concat(truth.ends, g.switched), u.flush) {
		g.Errorf("flush %s is not where a record ends", u.flush)
	}
	if u.flush < g.acked && !g.goesBack {
		g.Errorf("flush %s moves the slot back from %s", u.flush, g.acked)
	}
	g.acked = max(g.acked, u.flush)
	if start, ok := g.archiveStart(tli); ok {
		g.judgeBytes(tli, max(start, g.missing, g.judged[tli]), u.flush)
		g.judged[tli] = max(g.judged[tli], u.flush)
	}
}

// archiveStart is the start of the oldest segment of a timeline; ok is false when there is none.
func (g *rig) archiveStart(tli wal.Timeline) (start wal.LSN, ok bool) {
	names, _ := filepath.Glob(filepath.Join(g.cfg.Dir, fmt.Sprintf("%08X????????????????*", tli)))
	for _, name := range names { // sorted
		base, _, _ := strings.Cut(filepath.Base(name), ".")
		if s, err := wal.ParseSegment(base, g.size); err == nil {
			return s.Start, true
		}
	}
	return 0, false
}

// judgeBytes compares the files with the server's WAL.
func (g *rig) judgeBytes(tli wal.Timeline, from, to wal.LSN) {
	for from < to {
		s := g.size.Segment(tli, from)
		n := min(to, s.End()) - from
		path := filepath.Join(g.cfg.Dir, s.Name())
		f, err := os.Open(path)
		if err != nil {
			f, err = os.Open(path + ".partial")
		}
		have := make([]byte, n)
		if err == nil {
			_, err = f.ReadAt(have, int64(from-s.Start))
			f.Close()
		} else if err = unpack(path+".gz", have, int64(from-s.Start)); err != nil {
			err = unpack(path+".lz4", have, int64(from-s.Start))
		}
		if err != nil || !bytes.Equal(have, g.truth[tli].bytes[from-origin:][:n]) {
			g.Errorf("%s is not what the server had from %s to %s (%v)", s, from, to, err)
		}
		from += n
	}
}

// unpack reads p from a place in a compressed file.
func unpack(path string, p []byte, offset int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var z io.Reader = lz4.NewReader(f)
	if strings.HasSuffix(path, ".gz") {
		if z, err = gzip.NewReader(f); err != nil {
			return err
		}
	}
	if _, err := io.CopyN(io.Discard, z, offset); err != nil {
		return err
	}
	_, err = io.ReadFull(z, p)
	return err
}

// judgeFiles holds every file of the archive to promise 3.
func (g *rig) judgeFiles() {
	g.mu.Lock()
	defer g.mu.Unlock()
	entries, _ := os.ReadDir(g.cfg.Dir)
	for _, e := range entries {
		name, sealed := e.Name(), false
		base, partial := strings.CutSuffix(name, ".partial")
		base, gz := strings.CutSuffix(base, ".gz")
		base, lz4 := strings.CutSuffix(base, ".lz4")
		s, err := wal.ParseSegment(base, g.size)
		if sealed = err == nil && !partial; err != nil {
			aside := strings.HasSuffix(name, ".aborted") || strings.HasSuffix(name, ".diverged")
			if name != ".lock" && name != "archive.json" && !strings.HasSuffix(name, ".history") && !aside {
				g.Errorf("unexpected file %s", name)
			}
			continue
		}
		if info, err := e.Info(); err != nil || info.Size() != int64(g.size) && !gz && !lz4 {
			g.Errorf("%s: %v, %v", name, info.Size(), err)
		}
		if !sealed {
			continue
		}
		if ends := g.truth[s.Timeline].ends; len(ends) == 0 || ends[len(ends)-1] < s.End() {
			g.Errorf("%s is sealed, but no record ends after it", name)
			continue
		}
		g.judgeBytes(s.Timeline, s.Start, s.End())
	}
}

// logs collects what is logged.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// last is the last n lines.
func (l *logs) last(n int) string {
	lines := slices.Collect(strings.Lines(l.String()))
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// count is how many lines hold words.
func (l *logs) count(words string) (n int) {
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, words) {
			n++
		}
	}
	return n
}
