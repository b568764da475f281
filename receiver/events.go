package receiver

// Messages of the receiver's log that a program may go by, with the attributes that
// they are sure to have. Positions are wal.LSN values.
const (
	MsgConnected  = "connected"                   // host, server_version
	MsgStarting   = "streaming starts"            // timeline, lsn: what the server is asked for
	MsgStreaming  = "streaming started"           // the same, and the server agreed
	MsgSealed     = "segment sealed"              // segment, timeline, end
	MsgCompressed = "segment compressed"          // segment, compress, bytes
	MsgFollowing  = "following a new timeline"    // timeline, from_timeline, fork
	MsgPartial    = "segment is not complete"     // segment, timeline; when streaming ends in good order
	MsgEndReached = "the end position was passed" // timeline, lsn: the end of what was received
	MsgTrouble    = "not archiving"               // error
	MsgStopped    = "stopped"                     // timeline, flushed
)
