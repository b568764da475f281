package integration

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	cdppage "github.com/chromedp/cdproto/page"

	"github.com/walfleet/walfleet/receiver"
)

// screenshots is where "make screenshots" puts what TestScreenshots makes.
const screenshots = "../docs/screenshots"

// TestScreenshots makes the pictures of docs/screenshots, of a fleet that has been busy for a while.
func TestScreenshots(t *testing.T) {
	if os.Getenv("WALFLEET_SCREENSHOTS") == "" {
		t.Skip("pictures for the documentation; \"make screenshots\" makes them")
	}
	past, err := time.ParseDuration(os.Getenv("WALFLEET_SCREENSHOTS")) // that is to be seen in them
	if err != nil {
		t.Fatal(err)
	}
	b := startBrowser(t)
	dir := filepath.Join(os.TempDir(), "walfleet") // is to be read in the pictures
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	polar, catalog := startServer(t, serverOptions{}), startServer(t, serverOptions{image: "postgres:15"})
	f := startTroubledFleet(t, dir, watched("polar-eu", polar, `compress = "zstd"`), watched("catalog", catalog), watched("shipping", catalog, `compress = "lz4"`),
		watched("auth", polar), watched("ledger", catalog, "synchronous = false"))
	for i, s := range []*server{f.shared, f.mortal, polar, catalog} {
		breathe(t, s, time.Duration(100+70*i)*time.Second, 60<<10<<i)
	}
	// A change of the timeline, as after a switchover.
	polar.stop(t)
	polar.start(t)
	polar.shell(t, `touch "$PGDATA/standby.signal"; chown postgres "$PGDATA/standby.signal"`)
	polar.stop(t)
	polar.start(t)
	polar.promote(t)
	f.awaitStates(t, map[string]receiver.State{"polar-eu": receiver.Streaming, "auth": receiver.Streaming})

	begin := time.Now()
	for seconds := 0.0; seconds < past.Seconds(); pause(t.Context(), 5*time.Second) {
		if h := f.cluster(t, healthy).History; h != nil {
			seconds = float64(len(h.BytesPerSecond)) * h.IntervalSeconds
		}
		if time.Since(begin) > past+patience {
			t.Fatalf("the history has %v seconds", seconds)
		}
	}
	f.mortal.kill(t)
	f.awaitStates(t, map[string]receiver.State{down: receiver.Backoff})

	if err := os.MkdirAll(screenshots, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, shot := range []struct {
		name, path string
		reader     reader
	}{
		{"fleet-light-wide", "/", reader{}},
		{"fleet-dark-wide", "/", reader{dark: true}},
		{"fleet-light-narrow", "/", reader{narrow: true}},
		{"fleet-dark-narrow", "/", reader{narrow: true, dark: true}},
		{"fleet-zh", "/", reader{language: "zh-CN"}},
		{"cluster-light-wide", "/clusters/" + halted, reader{}},
		{"cluster-dark-wide", "/clusters/" + halted, reader{dark: true}},
		{"cluster-light-narrow", "/clusters/" + halted, reader{narrow: true}},
		{"cluster-dark-narrow", "/clusters/" + halted, reader{narrow: true, dark: true}},
		{"cluster-healthy", "/clusters/polar-eu", reader{}},
	} {
		p := b.open(t, f.url+shot.path, shot.reader)
		p.ready()
		picture := fewColours(t, p.picture(shot.reader))
		if len(picture) > 200<<10 {
			t.Errorf("%s has %d kB", shot.name, len(picture)>>10)
		}
		if err := os.WriteFile(filepath.Join(screenshots, shot.name+".png"), picture, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// picture is the page's upper part as PNG, which may be more than a screen.
func (p *page) picture(r reader) []byte {
	p.t.Helper()
	width, height := r.size()
	height = min(2*height, evaluate[int64](p, "document.documentElement.scrollHeight"))
	beyond := true
	return call(p, cdppage.CaptureScreenshot, cdppage.CaptureScreenshotParams{CaptureBeyondViewport: &beyond,
		Clip: &cdppage.Viewport{Width: float64(width), Height: float64(height), Scale: 1}}).Data
}

// fewColours is a PNG with its 256 commonest colours, which is a third of the size. Text does not show it.
func fewColours(t *testing.T, picture []byte) []byte {
	t.Helper()
	full, err := png.Decode(bytes.NewReader(picture))
	if err != nil {
		t.Fatal(err)
	}
	bounds := full.Bounds()
	at := func(i int) color.RGBA {
		return color.RGBAModel.Convert(full.At(bounds.Min.X+i%bounds.Dx(), bounds.Min.Y+i/bounds.Dx())).(color.RGBA)
	}
	pixels := bounds.Dx() * bounds.Dy()
	count := map[color.RGBA]int{}
	for i := range pixels {
		count[at(i)]++
	}
	commonest := slices.SortedFunc(maps.Keys(count), func(a, b color.RGBA) int { return cmp.Compare(count[b], count[a]) })
	var palette color.Palette
	for _, c := range commonest[:min(256, len(commonest))] {
		palette = append(palette, c)
	}
	nearest := map[color.RGBA]uint8{}
	for c := range count {
		nearest[c] = uint8(palette.Index(c))
	}
	few := image.NewPaletted(image.Rect(0, 0, bounds.Dx(), bounds.Dy()), palette)
	for i := range pixels {
		few.Pix[i] = nearest[at(i)]
	}
	var out bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, few); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// breathe writes to a server until the end of the test: more, less, and more again in each period, largest bytes a second
// at most.
func breathe(t *testing.T, s *server, period time.Duration, largest int) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	go func() {
		defer close(ended)
		begin := time.Now()
		for ctx.Err() == nil {
			phase := 2 * math.Pi * float64(time.Since(begin)) / float64(period)
			size := int(float64(largest) * math.Pow(0.5+0.4*math.Sin(phase)+0.1*math.Sin(7*phase), 2))
			s.try(ctx, fmt.Sprintf("SELECT pg_logical_emit_message(true, 'walfleet', repeat('x', %d))", size)) // or it is away
			pause(ctx, time.Second)
		}
	}()
}
