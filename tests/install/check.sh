#!/bin/sh
# check.sh BUILD: installs into a staging directory, then builds and runs a host program through pkg-config and through CMake.
set -eu
unset MAKEFLAGS MFLAGS # this is no part of the calling make's job pool
here=$(dirname "$0")
build=$(cd "$1" && pwd)
stage=$build/stage
rm -rf "$stage" "$build/consumer"
mkdir -p "$stage" "$build/consumer"
${MAKE:-make} --no-print-directory BUILD="$build" PREFIX="$stage/usr" install >/dev/null

export PKG_CONFIG_PATH="$stage/usr/lib/pkgconfig"
flags=$(pkg-config --cflags --libs plora)
strict="-pedantic -Wall -Wextra -Werror"
# shellcheck disable=SC2086  # lists of words
{
    ${CC:-cc} -std=c11 $strict -o "$build/consumer/c" "$here/consumer.c" $flags
    ${CXX:-c++} -std=c++17 $strict -x c++ -o "$build/consumer/cxx" "$here/consumer.c" $flags
}
for program in c cxx; do LD_LIBRARY_PATH="$stage/usr/lib" "$build/consumer/$program"; done

# A tree that was moved after the installation must still be found.
mv "$stage/usr" "$stage/moved"
cmake -S "$here" -B "$build/consumer/cmake" -DCMAKE_PREFIX_PATH="$stage/moved" >/dev/null
cmake --build "$build/consumer/cmake" >/dev/null
for program in C CXX static; do "$build/consumer/cmake/consumer_$program"; done

needed=$(readelf -d "$stage/moved/lib/libplora.so" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort | tr '\n' ' ')
for library in $needed; do
    case $library in
    libdnnl.so.* | liblapacke.so.* | libblas.so.* | libgomp.so.* | libm.so.* | libc.so.* | ld-linux*) ;;
    *) echo "libplora.so needs $library" >&2 && exit 1 ;;
    esac
done
readelf -d "$stage/moved/lib/libplora.so" | grep -q "SONAME.*\[libplora.so.0\]"
