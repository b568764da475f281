STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The integration tests ask for postgres:N and get the images of scripts/images.sh.
integration_env = CGO_ENABLED=1 \
	TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX=localhost/walfleet \
	TESTCONTAINERS_RYUK_DISABLED=true \
	$(if $(wildcard /.dockerenv),TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1)

# Those that make more of their faults when WALFLEET_TORTURE is set.
torture_tests = TestKilledAtAnyMoment|TestPowerLoss|TestPageCacheThatLies|TestAcknowledgesWhatWasSynced|TestKilledWhileCompressing|TestNoCommitIsLost

# 10,000 crash points, each of one goroutine: the race detector would find nothing in them, and take five times as long.
crash_points = go test -count=1 -timeout 30m -run '^TestNothingIs' ./internal/archive

.PHONY: help build package test test-unit torture lint bench demo images screenshots clean compiler tracer browser promtool postgresql

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

build: ## bin/walfleet
	CGO_ENABLED=0 go build -trimpath -o bin/walfleet ./cmd/walfleet

package: ## the deb and the rpm, in dist/ (GOARCH=arm64 for another processor)
	scripts/package.sh dist

test: compiler tracer browser promtool images ## every test, those against real servers in containers included
	$(integration_env) WALFLEET_CRASH_POINTS=1000 go test -race -count=1 -timeout 75m -p 2 -parallel 4 ./...
	$(crash_points)

test-unit: compiler promtool ## the tests that need no containers
	CGO_ENABLED=1 WALFLEET_CRASH_POINTS=1000 go test -race -count=1 $$(go list ./... | grep -v '/integration\b')
	$(crash_points)

torture: compiler tracer images ## kills, power losses, failing disks and traced runs, many times over: 5 to 10 minutes
	$(integration_env) WALFLEET_TORTURE=1 go test -race -count=1 -v -timeout 60m \
		-run '^($(torture_tests))$$' ./integration
	WALFLEET_CRASH_POINTS=100000 go test -count=1 -v -timeout 60m -run '^TestNothingIs' ./internal/archive

lint: ## formatting, go vet, staticcheck, syntax of the scripts
	@unformatted=$$(gofmt -l .) && if [ -n "$$unformatted" ]; then \
		echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	GOOS=darwin go vet ./...
	go run $(STATICCHECK) ./...
	for script in scripts/*.sh deploy/*/*.sh .ci/run; do bash -n "$$script" || exit; done

bench: postgresql ## walfleet beside pg_receivewal, written to docs/benchmarks.md: about an hour, on an idle machine
	go run ./bench

demo: build ## two throwaway primaries, and the daemon that archives them
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || scripts/images.sh 17
	bin/walfleet demo

screenshots: compiler browser images ## docs/screenshots, of the console in a browser: twenty minutes
	$(integration_env) WALFLEET_SCREENSHOTS=14m go test -count=1 -v -timeout 40m -run '^TestScreenshots$$' ./integration

images: ## the images of PostgreSQL that the tests use
	scripts/images.sh

clean: ## remove what the targets made in this directory
	rm -rf bin dist

compiler: # the race detector needs cgo
	@command -v "$$(go env CC)" >/dev/null || { \
		echo "go test -race needs a C compiler"; \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends gcc libc6-dev; }

tracer: # without these, the tests that need them say that they tested nothing
	@{ command -v strace && command -v mkfs.ext4; } >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends strace e2fsprogs; }

browser: # as tracer; the font has Chinese
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-wqy-microhei fonts-dejavu-core; }

promtool: # the one program that the tests of deploy/ need of Debian's package, which would start a server, too
	@command -v promtool >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
		dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && cd "$$dir" && \
		apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root prometheus && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && \
		install usr/bin/promtool /usr/local/bin/promtool; }

postgresql: # programs of a server for bench, which says what is missing elsewhere; Debian's packages would start a server, too
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
		[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || { \
		mkdir -p /etc/postgresql-common && { [ -e /etc/postgresql-common/createcluster.conf ] || \
			echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf; } && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
			-o Dpkg::Options::=--force-confold postgresql; }
