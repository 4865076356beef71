#!/usr/bin/env python3
"""Plants each bug of mutants.py in a copy of lib/ and cuda/, runs tests on the CPU or the emulated device (tests/emulator), and wants
it found.

    run_mutants.py BUILD [PATTERN...]     the bugs whose names match a pattern; all, without one

A bug is found when its test fails, or the emulator reports, with the text that mutants.py expects: a test that fails for another
reason does not count. Before, every test that is used runs in the same way on an unchanged copy, and must pass.
How things are compiled comes from make, in MUTANT_* (make/emulator.mk).
"""
import concurrent.futures
import fnmatch
import glob
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

from mutants import MUTANTS

LIMIT = 200  # seconds for one test
BUILD, PATTERNS = sys.argv[1], sys.argv[2:]
FOLDER = os.path.join(BUILD, "mutants")


def variable(name):
    return shlex.split(os.environ["MUTANT_" + name])


def tool(folder, command):
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"{folder}: {shlex.join(command)}\n{result.stdout}")


def place(name):
    """Where a file of the library lies: no two have the same name."""
    return next(path for path in (f"{folder}/{name}" for folder in ("lib", "lib/cpu", "cuda")) if os.path.exists(path))


def backend(mutant):
    return mutant.backend or ("cuda" if place(mutant.file).startswith("cuda/") else "cpu")


def plant(mutant, folder):
    """The copy of lib/ and cuda/, changed. Returns what went wrong with the text, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    for copied in ("lib", "cuda"):
        shutil.copytree(copied, os.path.join(folder, copied))
    path = os.path.join(folder, place(mutant.file))
    with open(path, encoding="utf-8") as file:
        text = file.read()
    found = text.count(mutant.old)
    if found != 1:
        return f"the text to be replaced occurs {found} times in {place(mutant.file)}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(mutant.old, mutant.new))
    return None


def compile_objects(mutant, folder):
    """The changed objects of the library: one, or one for each instruction level of a CPU kernel; of a CUDA kernel, fatbins.o with its
    new fat binary. The other kernels are those of the build."""
    unit = mutant.unit or mutant.file
    name, kind = os.path.splitext(unit)
    source = os.path.join(folder, place(unit))
    include = f"-I{folder}/lib"  # before the unchanged headers
    if kind == ".c":
        levels = sorted(key for key in os.environ if key.startswith("MUTANT_LEVEL_")) if name.endswith("_kernels") else [None]
        targets = []
        for level in levels:
            targets.append(os.path.join(folder, f"changed{len(targets)}.o"))
            how = shlex.split(os.environ[level]) if level else []
            compiler, *flags = variable("CC")
            tool(folder, [compiler, include, *flags, *how, "-c", "-o", targets[-1], source])
        return targets
    path = f"compute_{75 if mutant.sm < 80 else 80}"
    exact = ["-fmad=false"] if name in variable("EXACT") else []
    compiler, *flags = variable("NVCC")
    tool(folder, [compiler, include, *flags, *exact, "-gencode", f"arch={path},code={path}", "-o", os.path.join(folder, name + ".fatbin"),
                  source])
    kernels = [os.path.basename(path)[:-3] for path in sorted(glob.glob("cuda/*.cu"))]
    listed = "-DCUDA_FATBINS=" + " ".join(f"CUDA_FATBIN({kernel})" for kernel in kernels)
    target = os.path.join(folder, "changed.o")
    tool(folder, [*variable("CC"), listed, f"-Wa,-I{folder}", f"-Wa,-I{os.environ['CUDA_BUILD']}/cuda", "-c", "-o", target,
                  os.path.join(folder, "cuda", "fatbins.c")])
    return [target]


def link(folder, program, objects):
    target = os.path.join(folder, program)
    where = "tests/emulated" if os.path.exists(f"tests/emulated/{program}.c") else "tests"
    tool(folder, [*variable("LINK"), "-o", target, os.path.join(BUILD, where, program + ".o"), *objects, *variable("LIBS")])
    return target


def run(binary, test, device, sm, quick, finds):
    """Runs one test to its end, or to the first line that matches. Returns (the line or None, exit status, output)."""
    environment = dict(os.environ, PLORA_TEST_BACKEND=device, PLORA_TEST_ONLY=test, PLORA_TEST_QUICK=str(quick), EMU_SM=str(sm),
                       OMP_WAIT_POLICY="passive", OMP_NUM_THREADS="1", CMOCKA_MESSAGE_OUTPUT="stdout")
    environment["LD_LIBRARY_PATH"] = os.path.join(BUILD, "emulator")
    command = ["timeout", str(LIMIT), binary]
    with subprocess.Popen(command, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        output, line = "", None
        for text in process.stdout:
            output += text
            if finds and re.search(finds, text):
                line = text.strip()
                process.terminate()
                break
        else:
            process.wait()
    return line, process.returncode, output


def try_mutant(mutant):
    """Returns (found, what to say)."""
    start = time.monotonic()
    folder = os.path.join(FOLDER, mutant.name)
    stale = plant(mutant, folder)
    if stale:
        return False, f"{mutant.name}: STALE: {stale}"
    objects = compile_objects(mutant, folder)
    failures = []
    for quick, test in itertools.product((1, 0), mutant.tests.split()):  # all shapes where the few do not find it
        program, name = test.split(":")
        line, status, output = run(link(folder, program, objects), name, backend(mutant), mutant.sm, quick, mutant.finds)
        if line:
            shutil.rmtree(folder)
            line = line.replace(f"{os.path.abspath(folder)}/", "").replace(f"{folder}/", "")
            return True, f"{mutant.name:<24} {time.monotonic() - start:5.1f} s  {test}: {line[:170]}"
        said = [text for text in output.splitlines() if re.search("CHECK|want|error|emulator: (?!leak)", text)]
        failures.append(f"  {test}: " + ("passed" if status == 0 else "\n    ".join([f"status {status}, but by:", *said[:8]])))
    return False, f"{mutant.name}: SURVIVED in {folder}\n" + "\n".join(failures)


def try_unchanged(test):
    program, name, device, sm = test
    folder = os.path.join(FOLDER, f"unchanged-{program}-{name}-{device}-{sm}")
    os.makedirs(folder, exist_ok=True)
    _, status, output = run(link(folder, program, []), name, device, sm, 1, None)
    shutil.rmtree(folder)
    passed = status == 0 and "[  PASSED  ] 1 test" in output and "emulator: " not in output
    return passed, f"unchanged, {device}, sm_{sm}, {program}:{name}" + ("" if passed else f": status {status}\n{output[-3000:]}")


def main():
    chosen = [m for m in MUTANTS if not PATTERNS or any(fnmatch.fnmatch(m.name, p) for p in PATTERNS)]
    tests = sorted({(*test.split(":"), backend(m), m.sm) for m in chosen for test in m.tests.split()})
    os.environ.setdefault("PLORA_TEST_SEED", str(time.time_ns() >> 8))
    print(f"PLORA_TEST_SEED={os.environ['PLORA_TEST_SEED']}", flush=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for work, items in ((try_unchanged, tests), (try_mutant, chosen)):
            count = 0
            for good, text in pool.map(work, items):
                count += good
                failed += not good
                if work is try_mutant or not good:
                    print(text, flush=True)
            print(f"{count} of {len(items)} " + ("tests pass on the unchanged library" if work is try_unchanged else "bugs were found"),
                  flush=True)
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
