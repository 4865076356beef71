#!/usr/bin/env python3
"""The rules of the tree that a compiler does not know.

    rules.py OBJECT...        the library's objects, compiled

1. Includes only go down: include/ depends on nothing; lib/*.c see their own headers; lib/cpu/ and cuda/ see backend.h, the
   numeric headers and their own, never handles.h and never each other; lib/ sees neither of the two.
2. The library never prints, exits or aborts, handles no signals, does nothing when it is loaded, and has its memory from the
   allocator hooks. The objects' undefined symbols show it; context.o alone may call the default allocator.
"""
import glob
import os
import re
import subprocess
import sys

SHARED = {"backend.h", "dtype.h", "host_device.h", "nf4.h", "normal.h", "philox.h", "rounding.h", "status.h", "plora.h"}  # what a backend may see of lib/

FORBIDDEN = set("""
    printf vprintf puts putchar putc fputs fputc fprintf vfprintf dprintf vdprintf perror warn warnx err errx
    __printf_chk __fprintf_chk __vprintf_chk __vfprintf_chk __dprintf_chk stdout stderr stdin psignal syslog
    exit _exit _Exit quick_exit abort __assert_fail __assert_perror_fail atexit __cxa_atexit on_exit
    signal sigaction raise kill system popen fork execv execve execvp longjmp setjmp
    malloc calloc realloc reallocarray free strdup strndup asprintf vasprintf __asprintf_chk __vasprintf_chk
    posix_memalign aligned_alloc memalign valloc alloca getline getdelim realpath scandir glob open_memstream
    setlocale srand rand random setenv putenv
""".split())
ALLOWED = {"context.o": {"posix_memalign", "free"}}


def check_includes():
    folders = {"include": ["include/*.h"], "lib": ["lib/*.[ch]"], "cpu": ["lib/cpu/*.[ch]"], "cuda": ["cuda/*.*"]}
    files = {folder: sorted(path for pattern in patterns for path in glob.glob(pattern))
             for folder, patterns in folders.items()}
    own = {folder: {os.path.basename(path) for path in paths} for folder, paths in files.items()}
    may_see = {"include": set(), "lib": own["lib"] | {"plora.h"}, "cpu": own["cpu"] | SHARED, "cuda": own["cuda"] | SHARED}
    for folder, paths in files.items():
        for path in paths:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    match = re.match(r'\s*#\s*include\s*(["<])(.*?)[">]', line)
                    if not match:
                        continue
                    quoted, name = match.group(1) == '"', match.group(2)
                    bad = os.path.basename(name) not in may_see[folder] if quoted else (
                        folder == "include" and name not in ("stddef.h", "stdint.h"))
                    if bad or ".." in name or (quoted and "/" in name):
                        yield f"{path}:{number}: {folder}/ may not include {name}"


def check_objects(objects):
    for path in objects:
        output = subprocess.run(["nm", "-P", path], check=True, stdout=subprocess.PIPE, text=True).stdout
        undefined = {line.split()[0] for line in output.splitlines() if line.split()[1:2] == ["U"]}
        for name in sorted(undefined & FORBIDDEN - ALLOWED.get(os.path.basename(path), set())):
            yield f"{path}: calls {name}"
        sections = subprocess.run(["readelf", "-SW", path], check=True, stdout=subprocess.PIPE, text=True).stdout
        if re.search(r"\.(init_array|ctors|fini_array|dtors)\b", sections):
            yield f"{path}: runs code when the library is loaded or unloaded"


def main():
    objects = sys.argv[1:]
    problems = [*check_includes(), *check_objects(objects)]
    for problem in problems:
        print(problem)
    return 1 if problems or not objects else 0


if __name__ == "__main__":
    sys.exit(main())
