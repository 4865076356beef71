#!/usr/bin/env python3
"""Compares the ABI of plora.h and libplora.so with the record in tests/abi/.

    abi.py LIBRARY            compares, and shows what differs
    abi.py LIBRARY --update   writes the record

symbols.txt   the prototype of every exported function
layout.txt    size of every public struct, offset and size of every field, value of every constant (64-bit)

The functions that the header declares, those that lib/plora.map lists and those that the library exports must be the same.
"""
import difflib
import os
import re
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
HEADER = os.path.join(ROOT, "include", "plora.h")
CC = os.environ.get("CC", "cc").split()


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def preprocessed():
    """plora.h after the preprocessor, without what it includes."""
    lines, own = [], False
    for line in run(*CC, "-E", HEADER).splitlines():
        marker = re.match(r'# \d+ "(.*?)"', line)
        if marker:
            own = marker.group(1) == HEADER
        elif own:
            lines.append(line)
    return re.sub(r"__attribute__\s*\(\(.*?\)\)\)?", "", " ".join(lines))


def prototypes(text):
    found = {}
    for match in re.finditer(r"[^;{}]*?\b(plora_\w+)\s*\(([^;{}]*)\)\s*;", text):
        if "typedef" not in match.group(0):
            found[match.group(1)] = " ".join(match.group(0).split()).rstrip(";")
    return found


def layout(text):
    """A C program that prints every struct and constant, run."""
    rows = []
    for match in re.finditer(r"typedef struct (plora_\w+) \{(.*?)\} \1;", text):
        name = match.group(1)
        rows.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in match.group(2).split(";"):
            if field.strip():
                pointer = re.search(r"\(\*(\w+)\)", field)
                for part in [pointer.group(1)] if pointer else field.split(","):
                    member = re.search(r"(\w+)\s*(\[.*\])?\s*$", part).group(1)
                    rows.append(f'printf("    .{member} %zu %zu\\n", offsetof({name}, {member}), '
                                f"sizeof((({name} *)0)->{member}));")
    for match in re.finditer(r"\benum\s*\{(.*?)\}", text):
        for name in re.findall(r"\b(PLORA_\w+)", match.group(1)):
            rows.append(f'printf("{name} %d\\n", (int){name});')
    rows.append('printf("PLORA_ABI_VERSION %d\\n", PLORA_ABI_VERSION);')
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "layout.c"), os.path.join(folder, "layout")
        with open(source, "w", encoding="utf-8") as file:
            file.write('#include <stdio.h>\n#include "plora.h"\nint main(void)\n{\n' + "\n".join(rows) + "\n}\n")
        run(*CC, "-I", os.path.dirname(HEADER), "-o", program, source)
        return run(program)


def exported(library):
    names = (line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines() if " T " in line)
    return {name.split("@")[0] for name in names}


def compare_sets(what_a, a, what_b, b):
    problems = [f"{name}: in {what_a}, not in {what_b}" for name in sorted(a - b)]
    return problems + [f"{name}: in {what_b}, not in {what_a}" for name in sorted(b - a)]


def main():
    library, update = sys.argv[1], "--update" in sys.argv[2:]
    text = preprocessed()
    functions = prototypes(text)
    with open(os.path.join(ROOT, "lib", "plora.map"), encoding="utf-8") as file:
        mapped = set(re.findall(r"^\s+(plora_\w+);", file.read(), re.MULTILINE))
    problems = compare_sets("plora.h", set(functions), "lib/plora.map", mapped)
    problems += compare_sets("plora.h", set(functions), os.path.basename(library), exported(library))

    records = {"symbols.txt": "".join(f"{functions[name]}\n" for name in sorted(functions)), "layout.txt": layout(text)}
    for name, now in records.items():
        path = os.path.join(HERE, name)
        if update:
            with open(path, "w", encoding="utf-8") as file:
                file.write(now)
            continue
        with open(path, encoding="utf-8") as file:
            then = file.read()
        problems += difflib.unified_diff(then.splitlines(), now.splitlines(), f"tests/abi/{name}", "now", lineterm="", n=1)
    for problem in problems:
        print(problem)
    if problems:
        print("The ABI changed. If that is meant, and only adds, record it: make abi-update", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
