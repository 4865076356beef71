#!/bin/sh
# deps.sh GROUP...: sees that what the groups need is installed. Quick and silent when it is.
#
# As root on Debian or Ubuntu the missing packages are installed, by name. Otherwise the one command that does it is
# printed, and make stops.
set -u

need() { # need PACKAGE PROBE...: the package is missing when the probe fails
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
header() { echo "#include <$1>" | ${CC:-cc} ${CPPFLAGS:-} -include stdarg.h -include stddef.h -include setjmp.h -E -xc -; }
has() { command -v "$1"; }
fast_blas() { readlink -f /usr/lib/*/libblas.so.3 | grep openblas; }
clang_file() { test -e "$(clang-14 -print-resource-dir)/$1"; }

probe() {
    missing=
    for group in "$@"; do
        case $group in
        build)
            need libdnnl-dev header oneapi/dnnl/dnnl.h
            need libjsmn-dev header jsmn.h
            need libxxhash-dev header xxhash.h
            need liblapacke-dev header lapacke.h
            need libblas-dev header cblas.h
            has dpkg >/dev/null && need libopenblas0-openmp fast_blas # the reference BLAS does as well, but slowly
            ;;
        cuda) need g++ has g++ ;; # nvcc's host compiler
        examples) need libcjson-dev header cjson/cJSON.h ;;
        serve)
            need libmicrohttpd-dev header microhttpd.h
            need libutf8proc-dev header utf8proc.h
            ;;
        bench) need wrk has wrk ;;
        tests)
            need libcmocka-dev header cmocka.h
            need g++ has g++
            need cmake has cmake
            need pkg-config has pkg-config
            ;;
        python) need python3-venv python3 -c 'import ensurepip, venv' ;;
        fuzz)
            need clang-14 has clang-14
            need libclang-rt-14-dev clang_file lib/linux/libclang_rt.fuzzer-x86_64.a
            ;;
        lint)
            need clang-14 has clang-14
            need clang-format-14 has clang-format-14
            need clang-tidy-14 has clang-tidy-14
            need libomp-14-dev clang_file include/omp.h
            ;;
        valgrind) need valgrind has valgrind ;;
        *)
            echo "deps.sh: unknown group: $group" >&2
            exit 2
            ;;
        esac
    done
}

probe "$@"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" != 0 ] || ! has apt-get >/dev/null; then
    echo "These packages are missing. To install them (names as in Debian 12):" >&2
    echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends$missing" >&2
    exit 1
fi
exec 9<"$0" && flock 9 # one at a time under make -j
probe "$@"
[ -z "$missing" ] && exit 0
echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # a list of words
apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null || exit 1
probe "$@"
[ -z "$missing" ] && exit 0
echo "deps.sh: still missing after the installation:$missing" >&2
exit 1
