package wal

import "encoding/binary"

// The header of a page, little-endian as every platform that PolarDB and most that PostgreSQL run on
// (XLogPageHeaderData and XLogLongPageHeaderData in xlog_internal.h); WAL of a big-endian server is refused
// for its magic number.
//
//	 0  xlp_magic     uint16
//	 2  xlp_info      uint16
//	 4  xlp_tli       uint32
//	 8  xlp_pageaddr  uint64
//	16  xlp_rem_len   uint32, then 4 bytes of padding
//	24  xlp_sysid     uint64, from here on in a segment's first page only
//	32  xlp_seg_size  uint32
//	36  xlp_xlog_blcksz uint32
const (
	shortPageHeader = 24
	longPageHeader  = 40
)

// Bits of xlp_info.
const (
	pageContrecord = 0x0001 // XLP_FIRST_IS_CONTRECORD: goes on with the record that the page before began
	pageLong       = 0x0002 // XLP_LONG_HEADER
	pageOverwrite  = 0x0008 // XLP_FIRST_IS_OVERWRITE_CONTRECORD: that record was given up
	pageAllFlags   = 0x000F // XLP_ALL_FLAGS, with XLP_BKP_REMOVABLE (0x0004), which means nothing here
)

// pageMagicHigh is the upper byte of xlp_magic for all of PostgreSQL 13 to 18 and PolarDB 15; the lower
// one counts their changes of format.
const pageMagicHigh = 0xD1

// The header of a record (XLogRecord in xlogrecord.h):
//
//	 0  xl_tot_len  uint32, header included
//	 4  xl_xid      uint32
//	 8  xl_prev     uint64, start of the record before
//	16  xl_info     uint8
//	17  xl_rmid     uint8, then 2 bytes of padding
//	20  xl_crc      uint32, CRC-32C of what follows the header, then of the header up to here
//
// Lengths have no upper limit here. PostgreSQL 16 and later stay below 1020 MiB (XLogRecordMaxSize), earlier
// ones do not, and a wrong length of a record that goes on to the next page contradicts xlp_rem_len there.
const (
	recordHeader = 24
	recordCRC    = 20   // offset of xl_crc
	recordAlign  = 8    // MAXIMUM_ALIGNOF: records start at multiples of it
	rmgrXLOG     = 0    // RM_XLOG_ID
	xlogSwitch   = 0x40 // XLOG_SWITCH, in the upper half of xl_info
	rmgrInfoMask = 0xF0 // XLR_RMGR_INFO_MASK

	xlogOverwrite = 0xD0 // XLOG_OVERWRITE_CONTRECORD
)

// pageHeaderSize is the length of the header of the page that contains l.
func pageHeaderSize(z SegmentSize, l LSN) int {
	if z.Offset(l) < PageSize {
		return longPageHeader
	}
	return shortPageHeader
}

// isSwitch tells whether a record header is that of an XLOG_SWITCH, after which the rest of the segment
// is unused.
func isSwitch(h *[recordHeader]byte) bool {
	return h[17] == rmgrXLOG && h[16]&rmgrInfoMask == xlogSwitch
}

func u16(b []byte) uint16 { return binary.LittleEndian.Uint16(b) }
func u32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func u64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }
