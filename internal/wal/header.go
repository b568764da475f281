package wal

// ParseLongHeader reads the cluster's identity from the first page of a segment.
// ok is false when page is not the beginning of such a page.
func ParseLongHeader(page []byte) (systemID uint64, size SegmentSize, ok bool) {
	if len(page) < longPageHeader || page[1] != pageMagicHigh || u16(page[2:])&pageLong == 0 {
		return 0, 0, false
	}
	return u64(page[24:]), SegmentSize(u32(page[32:])), true
}

// RecordBegins reports whether a record's header begins in the page, going by
// the page's own header: either nothing of an earlier record is left in it, or
// less than the page holds.
func RecordBegins(page []byte) bool {
	if len(page) < longPageHeader || page[1] != pageMagicHigh {
		return false
	}
	info := u16(page[2:])
	if info&pageContrecord == 0 {
		return true
	}
	header := shortPageHeader
	if info&pageLong != 0 {
		header = longPageHeader
	}
	left := (uint64(u32(page[16:])) + recordAlign - 1) &^ (recordAlign - 1)
	return uint64(header)+left < PageSize
}

// PageMagic is xlp_magic of a page, which is the same all over a cluster: each major
// version of PostgreSQL has its own. ok is false when page is not the beginning of
// a page.
func PageMagic(page []byte) (magic uint16, ok bool) {
	if len(page) < 2 || page[1] != pageMagicHigh {
		return 0, false
	}
	return u16(page), true
}
