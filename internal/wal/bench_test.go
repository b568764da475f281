package wal_test

import (
	"fmt"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// BenchmarkFeed follows 16 MiB in pieces of the size of a streamed message.
func BenchmarkFeed(b *testing.B) {
	const size = 16 << 20
	for _, payload := range []int{30, 76, 1000, 8000} {
		for _, crc := range []bool{false, true} {
			b.Run(fmt.Sprintf("record=%d/crc=%v", payload+24, crc), func(b *testing.B) {
				g := pgtest.NewWAL(pgtest.WALConfig{Size: size})
				data := make([]byte, payload)
				for g.End() < 2*size {
					g.Append(data)
				}
				p := g.Bytes(size, 2*size)
				b.SetBytes(size)
				b.ReportAllocs()
				for b.Loop() {
					w := wal.NewWalker(wal.WalkerConfig{Start: size, Timeline: 1, Size: size, CheckCRC: crc})
					for off := 0; off < len(p); off += 128 << 10 {
						if err := w.Feed(p[off : off+128<<10]); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}
