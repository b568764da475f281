package wal_test

import (
	"math"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
)

func TestLSN(t *testing.T) {
	for _, c := range []struct {
		s string
		l wal.LSN
	}{
		{"0/0", 0},
		{"0/1000028", 0x1000028},
		{"16/B374D848", 0x16B374D848},
		{"1/0", 1 << 32},
		{"FFFFFFFF/FFFFFFFF", math.MaxUint64},
	} {
		l, err := wal.ParseLSN(c.s)
		if err != nil || l != c.l || l.String() != c.s {
			t.Errorf("ParseLSN(%q) = %s, %v", c.s, l, err)
		}
		if l, err := wal.ParseLSN(strings.ToLower(c.s)); err != nil || l != c.l {
			t.Errorf("ParseLSN of %q in lower case = %s, %v", c.s, l, err)
		}
	}
	if l, err := wal.ParseLSN("00000016/0000000A"); err != nil || l != 0x160000000A {
		t.Errorf("leading zeros: %s, %v", l, err)
	}
	for _, s := range []string{
		"", "/", "0", "0/", "/0", "0/0/0", " 0/0", "0/0 ", "0 /0", "+1/0", "-1/0", "0x1/0", "1_0/0", "G/0",
		"0/000000001", "000000001/0", "0/0\n", "0/0\x00", "٣/٣", strings.Repeat("0", 1000) + "/0",
	} {
		l, err := wal.ParseLSN(s)
		if err == nil {
			t.Errorf("ParseLSN(%q) = %s", s, l)
		} else if len(err.Error()) > 200 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("ParseLSN(%q): its error is not fit for a log: %q", s, err)
		}
	}
}
