package integration

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/verify"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// verifyArchive verifies an archive and fails the test when that finds something.
func verifyArchive(t testing.TB, dir string, o verify.Options) verify.Report {
	t.Helper()
	o.Jobs = 2
	o.Timeout = patience
	r, err := verify.Run(context.Background(), dir, o)
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	if !r.Whole {
		var text strings.Builder
		_ = r.Print(&text)
		t.Errorf("verify finds fault with what the server wrote:\n%s\n%s", &text, listing(t, dir))
	}
	return r
}

// manyKinds are statements whose records are of as many kinds as fit into a few megabytes: of all index access methods,
// DDL, sequences, large values, row locks, prepared transactions, checkpoints with images of full pages.
const manyKinds = `
	CREATE TABLE IF NOT EXISTS kinds (i int, t text, a int[], p point, b bigserial);
	SET wal_compression = %s;
	INSERT INTO kinds SELECT i, repeat(md5(i::text), i %% 40), ARRAY[i, i + 1], point(i, -i) FROM generate_series(1, 2000) i;
	CREATE INDEX ON kinds USING btree (i); CREATE INDEX ON kinds USING hash (i); CREATE INDEX ON kinds USING gin (a);
	CREATE INDEX ON kinds USING gist (p); CREATE INDEX ON kinds USING spgist (p); CREATE INDEX ON kinds USING brin (i);
	CHECKPOINT;
	UPDATE kinds SET t = t || 'x' WHERE i %% 3 = 0;
	DELETE FROM kinds WHERE i %% 7 = 0;
	VACUUM kinds;
	BEGIN; SELECT count(*) FROM (SELECT 1 FROM kinds FOR UPDATE) x; SAVEPOINT s; DELETE FROM kinds WHERE i < 50; ROLLBACK TO s; COMMIT;
	CHECKPOINT;
	INSERT INTO kinds SELECT i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 300)) FROM generate_series(1, 50) i;
	CREATE TABLE gone AS SELECT * FROM kinds; TRUNCATE gone; DROP TABLE gone;
	ANALYZE kinds;
	SELECT pg_logical_emit_message(false, 'x', repeat('y', 1500000));
	SELECT pg_switch_wal();
	DROP TABLE kinds;`

// writeKinds executes manyKinds.
func (s *server) writeKinds(t *testing.T, compression string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := s.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for line := range strings.SplitSeq(fmt.Sprintf(manyKinds, compression), "\n") { // VACUUM must be alone
		if _, err := conn.Exec(ctx, line).ReadAll(); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
}

// crashInRecord kills the server while it writes a record of many segments, which it gives up after its restart, unless it
// was faster than that.
func (s *server) crashInRecord(t *testing.T, written func() wal.LSN) {
	t.Helper()
	begin := s.end(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = s.try(ctx, "SELECT pg_logical_emit_message(false, 'x', repeat('y', 30000000))")
	}()
	await(t, patience, "a part of a large record is archived", func() (bool, string) {
		at := written()
		return at > begin+3*megabyte, at.String()
	})
	s.kill(t)
	cancel()
	<-ended
	s.start(t)
}

// TestVerifyRaisesNoFalseAlarm has an archive for each way of compressing, of all kinds of records and of crashes, on each
// version; verify finds nothing in them, while they are written and afterwards, and the server has the same.
func TestVerifyRaisesNoFalseAlarm(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image, segment: megabyte})
			methods := []string{"none", "gzip", "lz4", "zstd"}
			var clusters []string
			for _, m := range methods {
				clusters = append(clusters, cluster(m, s.conninfo(), fmt.Sprintf("slot = %q", m), fmt.Sprintf("compress = %q", m)))
			}
			d := startDaemon(t, configText(t.TempDir(), clusters...))
			for _, m := range methods {
				d.awaitState(t, m, receiver.Streaming)
			}
			for round, compression := range []string{"off", "on", "off"} {
				load := startLoad(t, s)
				s.writeKinds(t, compression)
				load.stop()
				if round < 2 {
					s.crashInRecord(t, func() wal.LSN { return d.status(t, "none").Written })
				}
				for _, m := range methods {
					verifyArchive(t, d.clusterDir(m), verify.Options{})
				}
			}
			for _, m := range methods {
				d.awaitFlushed(t, m, s.end(t))
			}
			end := s.end(t)
			d.stop(t)
			for _, m := range methods {
				r := verifyArchive(t, d.clusterDir(m), verify.Options{Against: s.conninfo()})
				t.Logf("%s, %s: %d segments, unproven: %v", image, m, r.Segments, r.Unproven)
				if r.Segments < 10 {
					t.Errorf("%s: only %d segments", m, r.Segments)
				}
				if n := len(r.Compared); n == 0 || r.Compared[n-1].To != end.String() {
					t.Errorf("%s: compared %v, the server's WAL ends at %s", m, r.Compared, end)
				}
			}
			findFlippedBits(t, d.clusterDir("none"))
		})
	}
}

var verifySeed = flag.Uint64("verify.seed", 0, "of the bits that are flipped; 0: a random one")

// findFlippedBits flips bits at random places of a real archive: verify finds each, or it lies where nothing is
// guaranteed: in the flag XLP_BKP_REMOVABLE, or in what verify itself calls unproven.
func findFlippedBits(t *testing.T, dir string) {
	seed := *verifySeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-verify.seed=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	unproven := verifyArchive(t, dir, verify.Options{}).Unproven
	files, err := filepath.Glob(filepath.Join(dir, "????????????????????????"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no segments: %v", err)
	}
	rounds := 60
	if os.Getenv("WALFLEET_TORTURE") != "" {
		rounds = 5000
	}
	flipped := 0
	for flipped < rounds {
		file := files[random.IntN(len(files))]
		data := readFile(t, file)
		offset := random.IntN(len(data))
		if random.IntN(3) == 0 {
			offset = offset/wal.PageSize*wal.PageSize + random.IntN(64)
		}
		mask := byte(1) << random.IntN(8)
		segment, err := wal.ParseSegment(filepath.Base(file), wal.SegmentSize(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		lsn := segment.Start + wal.LSN(offset)
		if offset%wal.PageSize == 2 && mask == 0x04 || slices.ContainsFunc(unproven, func(u verify.Unproven) bool {
			return lsn >= parseLSN(t, u.LSN) && lsn < parseLSN(t, u.End)
		}) {
			continue
		}
		flipped++
		flip := func() {
			data[offset] ^= mask
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		flip()
		r, err := verify.Run(t.Context(), dir, verify.Options{Jobs: 2})
		flip()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Faults) == 0 {
			t.Errorf("bit %02X at offset %d of %s, %s, was not found", mask, offset, filepath.Base(file), lsn)
		}
	}
	t.Logf("%d bits flipped", flipped)
	verifyArchive(t, dir, verify.Options{})
}

// TestVerifyKnowsPromotions has an archive with a lost tail of the old timeline.
func TestVerifyKnowsPromotions(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t, defaultImage)
	d := startDaemon(t, configText(t.TempDir(), cluster("any", standby.conninfo(), `source = "any"`)))
	d.awaitState(t, "any", receiver.Streaming)
	primary.writeKinds(t, "on")
	d.awaitFlushed(t, "any", primary.end(t))
	standby.promote(t)
	standby.writeKinds(t, "off")
	d.await(t, "any", "timeline 2", func(st receiver.Status) bool { return st.Timeline == 2 })
	d.awaitFlushed(t, "any", standby.end(t))
	dir := d.clusterDir("any")
	verifyArchive(t, dir, verify.Options{})
	d.stop(t)
	r := verifyArchive(t, dir, verify.Options{Against: standby.conninfo()})
	if len(r.Compared) != 2 {
		t.Errorf("compared: %v, want both timelines", r.Compared)
	}
	// The same archive with one thing wrong.
	other := startServer(t, serverOptions{segment: megabyte})
	if r, err := verify.Run(t.Context(), dir, verify.Options{Against: other.conninfo(), Timeout: patience}); err != nil || !strings.Contains(r.Error, "another cluster") {
		t.Errorf("compared with another cluster: %v %q", err, r.Error)
	}
	if err := os.Remove(filepath.Join(dir, "00000002.history")); err != nil {
		t.Fatal(err)
	}
	if r, err := verify.Run(t.Context(), dir, verify.Options{}); err != nil || len(r.Faults) != 1 || r.Faults[0].Kind != verify.History {
		t.Errorf("without the history: %v, %+v", err, r.Faults)
	}
}
