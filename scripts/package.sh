#!/usr/bin/env bash
# Makes the deb and the rpm of this tree, for Linux:
#
#     scripts/package.sh DIRECTORY        GOARCH=arm64 for another processor
set -euo pipefail
cd "$(dirname "$0")/.."

nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.44.0
out=$1
BUILD=$out/build
GOARCH=${GOARCH:-$(go env GOARCH)}
mkdir -p "$BUILD"

CGO_ENABLED=0 GOOS=linux GOARCH=$GOARCH go build -trimpath -buildvcs=auto -ldflags=-s -o "$BUILD/walfleet" ./cmd/walfleet
for shell in bash fish zsh; do
	env -u GOOS -u GOARCH go run ./cmd/walfleet completion $shell >"$BUILD/walfleet.$shell"
done

# The version is the binary's own: that of a tag, or one with the commit's time and name.
VERSION=$(go version -m "$BUILD/walfleet" | awk '$1 == "mod" { print $3 }')
case $VERSION in
v*) VERSION=${VERSION#v} ;;
*) VERSION=0.0.0-devel ;; # not from a repository
esac

rm -f "$out"/*.deb "$out"/*.rpm
export BUILD GOARCH VERSION
for packager in deb rpm; do
	env -u GOOS -u GOARCH -u CGO_ENABLED go run "$nfpm" package \
		--config <(sed "s/\${GOARCH}/$GOARCH/; s/\${VERSION}/$VERSION/" deploy/package/nfpm.yaml) \
		--packager $packager --target "$out"
done
