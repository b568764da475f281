package restore_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/restore"
	"github.com/walfleet/walfleet/internal/wal"
)

// upTo is segment n of w as a file has it that ends at end: zeros, or other bytes, follow.
func upTo(w *pgtest.WAL, n int, end wal.LSN, rest byte) []byte {
	data := bytesOf(w, n)
	for i := max(0, int64(end-begin)-int64(n)*mb); i < mb; i++ {
		data[i] = rest
	}
	return data
}

// before is the last end of a record at or before l.
func before(w *pgtest.WAL, l wal.LSN) wal.LSN {
	ends := w.Boundaries()
	i, found := slices.BinarySearch(ends, l)
	if found {
		return l
	}
	return ends[i-1]
}

func TestPartial(t *testing.T) {
	w := full(4)
	const middle = begin + 2*mb + mb/2
	crossing := begin + 3*mb // a record goes on behind it
	for _, tt := range []struct {
		what  string
		setUp func(p place)
		n     int
		end   wal.LSN // of what is restored; 0: nothing, for the archive does not have it
		says  string  // of an error
	}{
		{what: "in progress", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
		}},
		{what: "with other bytes behind", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0xAA))
		}},
		{what: "too short", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0)[:mb/2])
		}},
		{what: "of zeros", n: 2, end: 0, setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), make([]byte, mb))
		}},
		{what: "that the server has as far", n: 2, end: 0, setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.write(p.own(name(1, 2)), upTo(w, 2, middle, 0))
		}},
		{what: "that the server has fuller", n: 2, end: 0, setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.write(p.own(name(1, 2)), upTo(w, 2, middle+20000, 0))
		}},
		{what: "that the server has less of", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.write(p.own(name(1, 2)), upTo(w, 2, middle-40000, 0))
		}},
		{what: "that the server has a recycled segment for", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.write(p.own(name(1, 2)), bytesOf(w, 1))
		}},
		{what: "full, with a record that goes on in the next one", n: 2, end: crossing, setUp: func(p place) {
			p.store(w, 1, 2, ".partial")
			p.store(w, 1, 3, ".partial")
		}},
		{what: "full, with a record that does not end in the next one", n: 2, end: before(w, crossing), setUp: func(p place) {
			p.store(w, 1, 2, ".partial")
			p.write(filepath.Join(p.archive, name(1, 3)+".partial"), upTo(w, 3, crossing+48, 0))
		}},
		{what: "full, of which the server has the next one", n: 2, end: 0, setUp: func(p place) {
			p.store(w, 1, 2, ".partial")
			p.write(p.own(name(1, 2)), bytesOf(w, 2))
			p.write(p.own(name(1, 3)), bytesOf(w, 3))
		}},
		{what: "that goes on with a record", n: 3, end: before(w, crossing+mb/2), setUp: func(p place) {
			p.store(w, 1, 2, ".zst")
			p.write(filepath.Join(p.archive, name(1, 3)+".partial"), upTo(w, 3, crossing+mb/2, 0))
		}},
		{what: "that goes on with another record", n: 3, end: 0, setUp: func(p place) {
			p.store(w, 1, 2, "")
			data := bytesOf(w, 3)
			data[100] ^= 1
			p.write(filepath.Join(p.archive, name(1, 3)+".partial"), data)
		}},
		{what: "compressed, and cut off", n: 2, end: middle - 1, setUp: func(p place) {
			z := compress(p.t, bytesOf(w, 2), ".gz")
			p.write(filepath.Join(p.archive, name(1, 2)+".gz.partial"), z[:len(z)/2])
		}},
		{what: "compressed, and a plain one that is fuller", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.write(filepath.Join(p.archive, name(1, 2)+".lz4.partial"), compress(p.t, upTo(w, 2, middle-40000, 0), ".lz4"))
		}},
		{what: "plain, and a compressed one that is fuller", n: 2, end: before(w, middle), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle-40000, 0))
			p.write(filepath.Join(p.archive, name(1, 2)+".lz4.partial"), compress(p.t, upTo(w, 2, middle, 0), ".lz4"))
		}},
		{what: "beside the complete one", n: 2, end: crossing, setUp: func(p place) {
			p.store(w, 1, 2, ".gz")
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
		}},
		{what: "with complete ones behind", n: 2, says: "which has " + name(1, 3), setUp: func(p place) {
			p.write(filepath.Join(p.archive, name(1, 2)+".partial"), upTo(w, 2, middle, 0))
			p.store(w, 1, 3, "")
		}},
		{what: "with complete ones behind, that is all there", n: 2, end: crossing, setUp: func(p place) {
			p.store(w, 1, 2, ".partial")
			p.store(w, 1, 3, "")
		}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			p := newPlace(t)
			for n := range 2 {
				p.store(w, 1, n, "")
			}
			tt.setUp(p)
			data, err := p.run(name(1, tt.n), func(r *restore.Request) { r.Partial = true })
			switch {
			case tt.says != "":
				if err == nil || notFound(err) || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("%v, want an error that says %q", err, tt.says)
				}
			case tt.end == 0:
				if !notFound(err) {
					t.Errorf("%d bytes, %v; want nothing", len(data), err)
				}
			case err != nil:
				t.Error(err)
			case tt.end == middle-1: // wherever the compressed file was cut
				end := begin + wal.LSN(tt.n)*mb + wal.LSN(len(bytes.TrimRight(data, "\x00")))
				if at := before(w, end+8); len(data) != mb || end < middle-mb/4 || !bytes.Equal(data, upTo(w, tt.n, at, 0)) {
					t.Errorf("%d bytes up to %s", len(data), end)
				}
			case !bytes.Equal(data, upTo(w, tt.n, tt.end, 0)):
				t.Errorf("%d bytes that are not those of the server up to %s, zeros up to the segment's end", len(data), tt.end)
			}
		})
	}
}

// Where nobody asked for it, a partial file is not restored, but a person is told, unless a standby asks every few seconds.
func TestPartialIsForThoseWhoAskForIt(t *testing.T) {
	w := full(2)
	p := newPlace(t)
	p.store(w, 1, 0, "")
	p.store(w, 1, 1, ".partial")
	for _, standby := range []bool{false, true} {
		if standby {
			p.write(filepath.Join(p.data, "standby.signal"), nil)
		}
		_, err := p.run(name(1, 1), nil)
		none, ok := err.(*restore.NotFoundError)
		if !ok || (none.Hint == "") != standby {
			t.Errorf("standby %t: %+v", standby, err)
		}
	}
	if _, err := os.Stat(filepath.Join(p.archive, name(1, 1)+".partial")); err != nil {
		t.Error(err)
	}
}
