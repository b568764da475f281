#!/usr/bin/env bash
# Makes sure that the tests' PostgreSQL images exist as localhost/walfleet/postgres:N.
#
#     scripts/images.sh [N...]        default: 13 15 17 18
#
# Where a registry answers, the official image is pulled and tagged. Elsewhere, on Debian
# and Ubuntu, an image with the same contract is built from Debian's packages.
set -euo pipefail
cd "$(dirname "$0")"

repository=localhost/walfleet/postgres
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
recipe=$(cat images.sh postgres-entrypoint.sh | cksum | tr ' ' -)

die() {
	echo "images.sh: $*" >&2
	exit 1
}

can_be_root() {
	[[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null
}

as_root() { # where that can be; mmdebstrap may work without
	if [[ $(id -u) != 0 ]] && can_be_root; then sudo -n "$@"; else "$@"; fi
}

install_packages() {
	can_be_root && command -v apt-get >/dev/null || die "please install: $*"
	echo "installing $*" >&2
	as_root apt-get update -qq || true
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
		-o DPkg::Lock::Timeout=300 "$@" >/dev/null || die "please install: $*"
}

suite() {
	case $1 in
	13) echo bullseye ;;
	15) echo bookworm ;;
	17) echo trixie ;;
	18) echo forky ;;
	*) die "postgres:$1 cannot be pulled, and no suite of Debian has PostgreSQL $1" ;;
	esac
}

# present N: the image is there, and is an official one or of today's recipe.
present() {
	local label
	label=$(docker image inspect "$repository:$1" 2>/dev/null \
		--format '{{with .Config.Labels}}{{index . "walfleet.recipe"}}{{end}}') || return
	[[ -z $label || $label == "<no value>" || $label == "$recipe" ]]
}

engine_answers() {
	docker version >/dev/null 2>&1
}

start_engine() {
	local log=/var/log/dockerd.log
	[[ $(id -u) == 0 && -z ${DOCKER_HOST:-} ]] && command -v apt-get >/dev/null ||
		die "no Docker engine answers: please start one, and let this user use it"
	command -v dockerd >/dev/null || install_packages docker.io ca-certificates
	command -v docker >/dev/null || install_packages docker-cli
	engine_answers && return # the package has started it
	echo "starting dockerd, which logs to $log" >&2
	nohup dockerd >"$log" 2>&1 </dev/null &
	for _ in {1..60}; do
		engine_answers && return
		sleep 0.5
	done
	tail -n 20 "$log" >&2
	die "dockerd does not start"
}

limit() { # macOS has no timeout(1)
	if command -v timeout >/dev/null; then timeout "$@"; else shift && "$@"; fi
}

# One quick probe, unless the engine has its own way to a registry.
registry_answers() {
	local way
	way=$(docker info --format '{{.HTTPSProxy}}{{range .RegistryConfig.Mirrors}}{{.}}{{end}}')
	[[ -n $way ]] || limit 5 bash -c 'exec 3<>/dev/tcp/registry-1.docker.io/443' 2>/dev/null
}

pull() {
	limit 120 docker pull --quiet "postgres:$1" >/dev/null &&
		docker tag "postgres:$1" "$repository:$1" && echo "$repository:$1 pulled"
}

# A tmpfs makes builds much faster.
scratch_parent() {
	local dir=/dev/shm kilobytes options
	kilobytes=$(df --output=avail -k $dir 2>/dev/null | tail -n 1) || kilobytes=0
	options=$(findmnt -no OPTIONS -T $dir 2>/dev/null) || options=
	if ((kilobytes < 4000000)) || [[ ,$options, == *,noexec,* ]]; then dir=${TMPDIR:-/tmp}; fi
	echo "$dir"
}

# sources SUITE DIRECTORY: lines of a sources.list, from the first mirror that has the suite.
sources() {
	local mirror fetch=/usr/lib/apt/apt-helper options="[signed-by=$keyring]"
	for mirror in http://deb.debian.org http://archive.debian.org; do
		"$fetch" download-file "$mirror/debian/dists/$1/InRelease" "$2/release" >&2 || continue
		echo "deb $options $mirror/debian $1 main"
		"$fetch" download-file "$mirror/debian-security/dists/$1-security/InRelease" "$2/security" >&2 &&
			echo "deb $options $mirror/debian-security $1-security main"
		return 0
	done
	echo "no mirror has $1" >&2
	return 1
}

# import N TARFILE. "docker import" cannot set a stop signal, and "docker build" is slow with
# a layer of this size.
import() {
	local base container
	base=$(docker import \
		--change "LABEL walfleet.recipe=$recipe" \
		--change "ENV PATH=/usr/lib/postgresql/$1/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
		--change 'ENV LANG=C.UTF-8' \
		--change "ENV PG_MAJOR=$1" \
		--change 'ENV PGDATA=/var/lib/postgresql/data' \
		--change 'VOLUME /var/lib/postgresql/data' \
		--change 'EXPOSE 5432' \
		--change 'ENTRYPOINT ["docker-entrypoint.sh"]' \
		--change 'CMD ["postgres"]' \
		"$2") || return
	container=$(docker create --stop-signal SIGINT "$base") || return
	docker commit "$container" "$repository:$1" || return
	docker rm -v "$container"
}

# assemble N DIRECTORY. Old suites have stale Release files, and the JIT is not needed.
assemble() {
	local n=$1 dir=$2 suite
	suite=$(suite "$n") || return
	sources "$suite" "$dir" >"$dir/sources" || return
	# shellcheck disable=SC2016 # $1 is the hooks' own
	as_root env TMPDIR="$dir" mmdebstrap --variant=minbase --include="postgresql-$n" --skip=cleanup/run \
		--aptopt='Acquire::Check-Valid-Until "false"' \
		--aptopt='Acquire::Languages "none"' \
		--aptopt='Acquire::Retries "3"' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/i18n/*' \
		--dpkgopt='path-exclude=/usr/lib/*/libLLVM*' \
		--dpkgopt='path-exclude=/usr/lib/*/libz3.*' \
		--dpkgopt='path-exclude=/usr/lib/llvm-*' \
		--dpkgopt='path-exclude=/usr/lib/postgresql/*/lib/llvmjit*' \
		--dpkgopt='path-exclude=/usr/lib/postgresql/*/lib/bitcode/*' \
		--essential-hook='mkdir "$1/etc/postgresql-common"' \
		--essential-hook='echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"' \
		--customize-hook='upload postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh' \
		--customize-hook='chmod 755 "$1/usr/local/bin/docker-entrypoint.sh"' \
		--customize-hook='chroot "$1" install -d -o postgres -g postgres -m 1777 /var/lib/postgresql/data /var/run/postgresql /docker-entrypoint-initdb.d' \
		--customize-hook="sed -i \"s/^#listen_addresses = 'localhost'/listen_addresses = '*'/\" \"\$1/usr/share/postgresql/$n/postgresql.conf.sample\"" \
		--customize-hook="grep -q \"^listen_addresses = '\\*'\" \"\$1/usr/share/postgresql/$n/postgresql.conf.sample\"" \
		"$suite" - - <"$dir/sources" >"$dir/image.tar" || return
	import "$n" "$dir/image.tar"
}

build() {
	local dir
	dir=$(mktemp -d "$(scratch_parent)/walfleet-images.XXXXXX")
	# shellcheck disable=SC2064 # the directory as it is now
	trap "as_root rm -rf --one-file-system '$dir'" EXIT
	chmod 755 "$dir"
	if ! assemble "$1" "$dir" >"$dir/log" 2>&1; then
		cat "$dir/log" >&2
		die "$repository:$1 could not be built"
	fi
	echo "$repository:$1 built in $SECONDS s"
}

if [[ ${1:-} == --build ]]; then
	build "$2"
	exit
fi

[[ $# -gt 0 ]] || set -- 13 15 17 18
engine_answers || start_engine
[[ -z $(command -v flock) ]] || { exec 9<images.sh && flock 9; } # one run at a time

pulling=unknown
missing=()
for n in "$@"; do
	if present "$n"; then
		echo "$repository:$n present"
		continue
	fi
	if [[ $pulling == unknown ]]; then
		if registry_answers; then pulling=yes; else pulling=no; fi
	fi
	if [[ $pulling == no ]] || ! pull "$n"; then
		pulling=no
		suite "$n" >/dev/null
		missing+=("$n")
	fi
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

[[ -x /usr/lib/apt/apt-helper ]] ||
	die "${missing[*]}: not pulled, and images can be built on Debian and Ubuntu only"
command -v mmdebstrap >/dev/null && [[ -e $keyring ]] ||
	install_packages mmdebstrap debian-archive-keyring
printf '%s\n' "${missing[@]}" | xargs -n 1 -P 2 ./images.sh --build
docker image prune --force --filter label=walfleet.recipe >/dev/null # those replaced
