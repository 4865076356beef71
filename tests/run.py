#!/usr/bin/env python3
"""Runs test suites one after the other and adds up what they report.

    run.py LOG_FOLDER SUITE...          a suite is a program, or NAME=COMMAND for the shell; $TEST_WRAPPER goes before programs

A cmocka program reports in TAP ("ok 1 - name"), pytest by its summary line; any other command is one test that passes when
it exits with 0. A suite that crashes, or reports nothing, counts as failed. The last line is "N passed, N failed".
"""
import os
import re
import subprocess
import sys
import time


def count(output, status):
    passed = len(re.findall(r"^ok \d", output, re.MULTILINE))
    failed = len(re.findall(r"^not ok \d", output, re.MULTILINE))
    planned = re.findall(r"^1\.\.(\d+)", output, re.MULTILINE)
    if planned:  # TAP: a program that ends before all its tests have reported
        failed = max(failed, sum(map(int, planned)) - passed)
    elif re.search(r"^(=+ )?\d+ (passed|failed|error|skipped).* in [\d.]+s", output, re.MULTILINE):
        summary = output.rstrip().splitlines()[-1]
        passed, failed = (sum(int(n) for n in re.findall(rf"(\d+) (?:{words})", summary))
                          for words in ("passed", "failed|errors?|skipped"))
    else:
        passed = 1 if status == 0 else 0
    if (status != 0 or passed == 0) and failed == 0:
        failed = 1
    return passed, failed


def main():
    folder, suites = sys.argv[1], sys.argv[2:]
    os.makedirs(folder, exist_ok=True)
    environment = dict(os.environ, CMOCKA_MESSAGE_OUTPUT="TAP", PYTHONDONTWRITEBYTECODE="1")
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, threads that spin at barriers starve each other
    environment.pop("MAKEFLAGS", None)  # suites that call make are no part of this make's job pool
    environment.pop("MFLAGS", None)
    totals = [0, 0]
    for suite in suites:
        name, _, command = suite.partition("=")
        if not command:
            name, command = os.path.basename(suite), f"{os.environ.get('TEST_WRAPPER', '')} {suite}"
        start = time.monotonic()
        result = subprocess.run(command, shell=True, env=environment, text=True, errors="replace",
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - start
        with open(os.path.join(folder, f"{name}.log"), "w", encoding="utf-8") as log:
            log.write(result.stdout)
        passed, failed = count(result.stdout, result.returncode)
        totals = [totals[0] + passed, totals[1] + failed]
        print(f"{name:<24} {passed:4} passed {failed:4} failed {seconds:8.1f} s", flush=True)
        if failed:
            print(f"{result.stdout}\n^^^ {name}: exit status {result.returncode}", flush=True)
    print(f"{totals[0]} passed, {totals[1]} failed")
    return 1 if totals[1] or not totals[0] else 0


if __name__ == "__main__":
    sys.exit(main())
