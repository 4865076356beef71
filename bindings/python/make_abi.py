#!/usr/bin/env python3
"""Writes plora/_abi.py, plora.h as ctypes, from the header itself: `make abi-update` runs it, `make abi` compares.

    make_abi.py            compares plora/_abi.py with what the header says now, and shows what differs
    make_abi.py --update   writes it

The constants and defaults are what a C program prints that includes the header. Needs a C compiler, $CC or cc.
"""
import difflib
import os
import re
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "tests", "abi"))
import abi  # noqa: E402

OUTPUT = os.path.join(HERE, "plora", "_abi.py")
SCALARS = {
    "void": "None", "size_t": "c_size_t", "float": "c_float", "double": "c_double", "char": "c_char", "int": "c_int",
    **{f"{sign}int{bits}_t": f"c_{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
HEAD = '''# Made from include/plora.h by make_abi.py: do not edit, `make abi-update` writes it.
"""plora.h as ctypes: constants, structs, prototypes. What each means is said in plora.h."""
from ctypes import CFUNCTYPE, POINTER, Structure
'''


class Types:
    """C types as ctypes. Handles, and what has no type, are plain addresses: c_void_p."""

    def __init__(self, text):
        self.structs = [m.group(1) for m in re.finditer(r"typedef struct (plora_\w+) \{", text)]
        self.names = dict(SCALARS, **dict.fromkeys(self.structs))
        self.handles = [m.group(1) for m in re.finditer(r"typedef struct (plora_\w+) \1;", text)]
        for match in re.finditer(r"typedef (\w+) (plora_\w+);", text):
            self.names[match.group(2)] = self.names[match.group(1)]

    def of(self, text):
        stars = text.count("*")
        words = [word for word in re.findall(r"\w+", text.replace("*", " ")) if word not in ("const", "struct")]
        name = words[0]
        if name in self.handles:
            name = "void"
        if name in ("void", "char") and stars:
            kind, stars = "c_void_p" if name == "void" else "c_char_p", stars - 1
        else:
            kind = name if name in self.structs else self.names[name]
        return "POINTER(" * stars + kind + ")" * stars

    def function(self, result, arguments):
        kinds = [] if arguments.strip() in ("", "void") else [self.of(unnamed(a)) for a in arguments.split(",")]
        return [self.of(result), *kinds]


def unnamed(declaration):
    """The type of `const plora_matrix *x` or of `uint32_t flags`, without the name."""
    return re.sub(r"\b\w+\s*(\[\d*\])?\s*$", lambda m: "*" if m.group(1) else "", declaration.strip())


def fields_of(body, types):
    for field in filter(str.strip, body.split(";")):
        function = re.match(r"(.*?)\(\*(\w+)\)\s*\((.*)\)", field.strip())
        if function:
            yield function.group(2), f"CFUNCTYPE({', '.join(types.function(function.group(1), function.group(3)))})"
            continue
        first, *more = field.split(",")
        kind = unnamed(first)
        for part in (first, *more):
            name, length = re.search(r"(\w+)\s*(?:\[(\d+)\])?\s*$", part).groups()
            stars = "*" * part.count("*") if part is not first else ""
            base = types.of((kind.rstrip("*") if part is not first else kind) + stars)
            yield name, f"{base} * {length}" if length else base


def printed(text, header):
    """Runs a C program: every enum constant and macro number, and every _INIT macro field by field."""
    rows = []
    for match in re.finditer(r"\benum\s*\{(.*?)\}", text):
        rows += [f'printf("{name} = %d\\n", (int){name});' for name in re.findall(r"\b(PLORA_\w+)", match.group(1))]
    for name in re.findall(r"#define (PLORA_\w+) \d+$", header, re.MULTILINE):
        rows.append(f'printf("{name} = %d\\n", (int){name});')
    rows.append('printf("\\n");')
    for match in re.finditer(r"typedef struct (plora_\w+) \{(.*?)\} \1;", text):
        name = match.group(1)
        if f"#define {name.upper()}_INIT" not in header:
            continue
        rows.append(f'{{ {name} value = {name.upper()}_INIT; printf("{name}\\n");')
        for field in filter(str.strip, match.group(2).split(";")):
            if "*" in field or "[" in field or field.split()[0].startswith("plora_") or "struct_size" in field:
                continue  # pointers and matrices begin as NULL and 0
            for part in field.split(","):
                member = re.search(r"(\w+)\s*$", part).group(1)
                rows.append(f'printf("    {member} %.17g\\n", (double)value.{member});')
        rows.append("}")
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "probe.c"), os.path.join(folder, "probe")
        with open(source, "w", encoding="utf-8") as file:
            file.write('#include <stdio.h>\n#include "plora.h"\nint main(void)\n{\n' + "\n".join(rows) + "\n}\n")
        abi.run(*abi.CC, "-I", os.path.dirname(abi.HEADER), "-o", program, source)
        return abi.run(program).split("\n\n")


def defaults_of(text):
    found = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            fields = found.setdefault(line, {})
            continue
        name, value = line.split()
        if float(value) != 0:
            fields[name] = float(value)
    return found


def generate():
    text = abi.preprocessed()
    with open(abi.HEADER, encoding="utf-8") as file:
        header = file.read()
    types = Types(text)
    constants, defaults = printed(text, header)
    defaults = defaults_of(defaults)
    lines = ["", constants.strip(), ""]
    for match in re.finditer(r"typedef struct (plora_\w+) \{(.*?)\} \1;", text):
        name = match.group(1)
        fields = list(fields_of(match.group(2), types))
        lines += [f"\nclass {name}(Structure):\n    _fields_ = ["]
        lines += [f'        ("{field}", {kind}),' for field, kind in fields]
        lines += ["    ]"]
        if name in defaults:
            kinds = dict(fields)
            values = {k: v if kinds[k] == "c_double" else int(v) for k, v in defaults[name].items()}
            lines += ["    _defaults_: dict = {" + ", ".join(f'"{k}": {v!r}' for k, v in values.items()) + "}"]
        lines += [""]
    lines += ["\n# name: (result, arguments)\nFUNCTIONS = {"]
    for name, prototype in abi.prototypes(text).items():
        result, arguments = re.match(rf"(.*?)\b{name}\s*\((.*)\)$", prototype).groups()
        kinds = types.function(result, arguments)
        single = f'    "{name}": ({kinds[0]}, [{", ".join(kinds[1:])}]),'
        if len(single) > 120:
            single = f'    "{name}": (\n        {kinds[0]},\n        [{", ".join(kinds[1:])}],\n    ),'
        lines.append(single)
    body = "\n".join([*lines, "}", ""])
    scalars = sorted(set(re.findall(r"\bc_\w+", body)))
    return f"{HEAD}from ctypes import {', '.join(scalars)}\n{body}"


def main():
    now = generate()
    if "--update" in sys.argv[1:]:
        with open(OUTPUT, "w", encoding="utf-8") as file:
            file.write(now)
        return 0
    with open(OUTPUT, encoding="utf-8") as file:
        then = file.read()
    for line in difflib.unified_diff(then.splitlines(), now.splitlines(), "plora/_abi.py", "plora.h", lineterm="", n=1):
        print(line)
    if then != now:
        print("plora/_abi.py does not say what plora.h says: make abi-update", file=sys.stderr)
    return then != now


if __name__ == "__main__":
    sys.exit(main())
