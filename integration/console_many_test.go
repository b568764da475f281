package integration

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"
)

// TestConsoleOf500Clusters measures a fleet of 500 clusters whose servers are not there. Its limits are those of a
// machine that is slow, and busy with other tests.
func TestConsoleOf500Clusters(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	port := freePort(t)
	url := fmt.Sprintf("http://%s:%d", host, port)
	const n = 500
	var clusters []string
	for i := range n {
		clusters = append(clusters, cluster(fmt.Sprintf("cluster-%03d", i), refusing, fmt.Sprintf("slot = \"s%03d\"", i)))
	}
	p := startProgram(t, listening(port, configText(t.TempDir(), clusters...)))
	p.stderr.await(t, "not archiving", "cluster=cluster-499")

	begin := time.Now()
	scrape := get(t, url+"/metrics")
	t.Logf("/metrics: %d kB in %s", len(scrape)>>10, time.Since(begin).Round(time.Millisecond))
	if len(scrape) > 8<<20 {
		t.Errorf("/metrics has %d bytes", len(scrape))
	}
	begin = time.Now()
	status := get(t, url+"/api/v1/status")
	t.Logf("/api/v1/status: %d kB in %s", len(status)>>10, time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	html := get(t, url+"/")
	t.Logf("the page: %d kB in %s", len(html)>>10, time.Since(begin).Round(time.Millisecond))
	t.Logf("its stream: %d kB a second", bytesPerSecond(t, url+"/events")>>10)

	begin = time.Now()
	tab := b.open(t, url, reader{})
	tab.ready()
	t.Logf("in a browser it was live after %s", time.Since(begin).Round(time.Millisecond))
	if rows := evaluate[int](tab, `document.querySelectorAll("#rows tr").length`); rows != n {
		t.Errorf("%d rows", rows)
	}
	type smoothness struct {
		Load             float64 // ms from the navigation until the page was loaded
		Nodes            int
		Tasks            int     // that took more than 50 ms
		Longest          float64 // of them, in ms
		Frame            float64 // the longest time between two frames
		Frames           int
		Typed            float64 // ms from a key in the filter until the rows are as they should be
		LongestTyped     float64
		TransferredBytes float64
	}
	s := evaluate[smoothness](tab, `(async () => {
		const navigation = performance.getEntriesByType("navigation")[0];
		const tasks = [];
		new PerformanceObserver(list => tasks.push(...list.getEntries().map(e => e.duration))).observe({type: "longtask", buffered: false});
		const frames = [];
		let last = performance.now();
		const end = last + 6000;
		await new Promise(done => requestAnimationFrame(function frame(now) {
			frames.push(now - last);
			last = now;
			now < end ? requestAnimationFrame(frame) : done();
		}));
		const filter = document.querySelector("#filter");
		const typed = [];
		for (const text of ["4", "49", "499", ""]) {
			const begin = performance.now();
			filter.value = text;
			filter.dispatchEvent(new Event("input", {bubbles: true}));
			const want = text === "" ? 500 : [...document.querySelectorAll("#rows tr")].filter(r => r.dataset.cluster.includes(text)).length;
			while ([...document.querySelectorAll("#rows tr")].filter(r => r.offsetParent).length !== want && performance.now() < begin + 10000)
				await new Promise(requestAnimationFrame);
			typed.push(performance.now() - begin);
		}
		return {Load: navigation.loadEventEnd, Nodes: document.querySelectorAll("*").length, Tasks: tasks.length, Longest: Math.max(0, ...tasks),
			Frame: Math.max(...frames), Frames: frames.length, Typed: typed.reduce((a, b) => a + b) / typed.length, LongestTyped: Math.max(...typed),
			TransferredBytes: navigation.transferSize};
	})()`)
	t.Logf("%+v", s)
	if s.Longest > 10000 || s.LongestTyped > 9000 { // what a busy machine alone does not make of it
		t.Errorf("the page is not smooth: %+v", s)
	}
	// A change of a row that is far below reaches the reader all the same.
	tab.await("a cluster's page", `document.querySelector("#rows tr:last-child a").href.includes("/clusters/")`)
	tab.click("#rows tr:last-child a")
	tab.await("the cluster's page", `document.body?.dataset.page === "cluster"`)
}

// refusing is the conninfo of a server that refuses connections at once.
const refusing = "host=127.0.0.1 port=1 user=walfleet sslmode=disable"

// bytesPerSecond reads a stream for some seconds.
func bytesPerSecond(t *testing.T, address string) int {
	t.Helper()
	const span = 5 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), span)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Accept", "text/event-stream")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	n, _ := io.Copy(io.Discard, answer.Body) // until the time is over
	return int(float64(n) / span.Seconds())
}
