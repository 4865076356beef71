#!/usr/bin/env python3
"""What is known of the CUDA kernels before they run on hardware: registers, shared memory, spills, occupancy, the instructions.

    cuda_report.py --fatbins FOLDER --cuobjdump PROGRAM [--profile FILE] --output FILE.md

Of each kernel and architecture: registers and static shared memory as compiled; spills, as instructions that touch local memory (any
is an error); occupancy, from the block size that the kernel declares and the shared memory of its largest launch; whether it
moves global memory 16 bytes at a time, and uses the tensor cores. --profile is what the emulator counted (EMU_PROFILE) while
tests/bench/cuda_traffic.c ran each kernel on a shape that is large and even: dynamic shared memory, and the bytes moved per element
beside the least possible, and its operations; from these, what share of an H100's memory bandwidth it can reach: `predict()`.
"""
import argparse
import collections
import json
import pathlib
import re
import subprocess
import sys

# Of a multiprocessor: warps, blocks, shared memory in KiB, and what is reserved of it for each block (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"). Registers: 65,536, given out to warps in units of 256, on all of them.
LIMITS = {75: (32, 16, 64, 0), 80: (64, 32, 164, 1), 86: (48, 16, 100, 1), 89: (48, 24, 100, 1), 90: (64, 32, 228, 1),
          100: (64, 32, 228, 1), 120: (48, 24, 100, 1)}
# Kernels that must stream 16 bytes an access, those of which that is asked when they write, and those that must multiply on the tensor
# cores from sm_80 on.
STREAMING = re.compile(r"^(merge_(rounded_)?(report_)?(f32|bf16|f16)|(batch_)?expand_(f32|bf16)|adamw|sgd|scale)_kernel$")
WRITING = re.compile(r"^(init_(uniform|gaussian)|dequantise_(int8|nf4))_kernel$")
TENSOR = re.compile(r"^(merge_(rounded_)?(report_)?(f32|bf16|f16)|(batch_)?(shrink|expand)_bf16|gradient_bf16)_kernel$")
# Of an H100 SXM, as in tests/ladder/ladder.h: bytes/s of memory and of L2, operations/s of fp32 and of tf32; of these, 0.6 is what a
# kernel by mma.sync or fma is taken to reach.
MEMORY, L2, FMA, TENSOR_CORES, REACHED = 3.35e12, 5.5e12, 67e12, 495e12, 0.6


def run(*command):
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def resources(cuobjdump, fatbin):
    """{(arch, kernel): (registers, static shared bytes)}"""
    found, arch, kernel, is_code = {}, 0, "", False
    for line in run(cuobjdump, "-res-usage", str(fatbin)).splitlines():
        if line.startswith("Fatbin"):
            is_code = "elf" in line
        elif match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r" Function (\S+):", line):
            kernel = match[1]
        elif is_code and (match := re.match(r"\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", line)):
            reserved = 1024 if arch >= 90 and int(match[2]) else 0  # there it is counted in
            found[arch, kernel] = int(match[1]), int(match[2]) - reserved
    return found


def instructions(cuobjdump, fatbin):
    """{(arch, kernel): Counter of opcodes, modifiers included}"""
    found, arch, counter = {}, 0, None
    for line in run(cuobjdump, "-sass", str(fatbin)).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s+Function : (\S+)", line):
            counter = found[arch, match[1]] = collections.Counter()
        elif counter is not None and (match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            counter[match[1]] += 1
    return found


def block_sizes(cuobjdump, fatbin):
    """{kernel: threads of a block}, which every kernel declares."""
    return {name: int(threads) for name, threads in
            re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", run(cuobjdump, "-ptx", str(fatbin)))}


def occupancy(arch, threads, registers, shared):
    """Resident warps over the most possible."""
    warps_most, blocks_most, shared_most, reserved = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    bytes_each = -(-(shared + 1024 * reserved) // 128) * 128
    by_shared = shared_most * 1024 // bytes_each if bytes_each else blocks_most
    return min(warps_most // warps, blocks_most, by_registers, by_shared) * warps / warps_most


class Kernel:
    def __init__(self, name, arch, usage, threads, opcodes, profile):
        self.name, self.arch, self.threads = name, arch, threads
        self.registers, self.static_shared = usage
        self.dynamic_shared = profile.get("dynamic_shared", 0)
        self.spills = sum(n for op, n in opcodes.items() if re.match(r"(LDL|STL)\b", op))
        loads = [op for op in opcodes.elements() if re.match(r"(LDG|LDGSTS)\b", op)]
        stores = [op for op in opcodes.elements() if re.match(r"STG\b", op)]
        self.wide = any(".128" in op for op in loads), any(".128" in op for op in stores)
        self.tensor = sum(n for op, n in opcodes.items() if re.match(r"HMMA\b", op))
        self.occupancy = occupancy(arch, threads, self.registers, self.static_shared + self.dynamic_shared)

    def is_empty(self):
        """Not compiled for this architecture: the fp32 kernels do its work."""
        return self.arch < 80 and "merge" not in self.name and bool(TENSOR.match(self.name))

    def faults(self):
        where = f"{self.name} on sm_{self.arch}"
        if self.spills:
            yield f"{where}: {self.spills} instructions touch local memory"
        if STREAMING.match(self.name) and not self.is_empty() and not all(self.wide):
            yield f"{where}: no 16-byte {'loads' if not self.wide[0] else 'stores'}"
        if WRITING.match(self.name) and not self.wide[1]:
            yield f"{where}: no 16-byte stores"
        if TENSOR.match(self.name) and self.arch >= 80 and not self.tensor:
            yield f"{where}: no tensor-core products"

    def row(self):
        wide = "/".join("16 B" if w else "-" for w in self.wide)
        return (f"| `{self.name}` | {self.threads} | {self.registers} | {self.static_shared + self.dynamic_shared:,} | {self.spills} | "
                f"{100 * self.occupancy:.0f} % | {wide} | {self.tensor or '-'} |")


def collect(arguments, profile):
    kernels = []
    for fatbin in sorted(pathlib.Path(arguments.fatbins).glob("*.fatbin")):
        usage, opcodes = resources(arguments.cuobjdump, fatbin), instructions(arguments.cuobjdump, fatbin)
        threads = block_sizes(arguments.cuobjdump, fatbin)
        for (arch, name), used in usage.items():
            if name not in threads:
                sys.exit(f"cuda_report: {name} of {fatbin.name} declares no block size (__launch_bounds__)")
            kernels.append(Kernel(name, arch, used, threads[name], opcodes[arch, name], profile.get(name, {})))
    if not kernels:
        sys.exit(f"cuda_report: no machine code in {arguments.fatbins}: is CUDA_TARGETS empty?")
    return kernels


def predict(case):
    """The share of an H100's memory bandwidth at which a case's least bytes move, and what bounds it: the slowest of the memory, which
    moves the least bytes, of L2, which moves all of them, and of the arithmetic. Latency is not in it, and only takes away."""
    least = case["least"] / MEMORY
    times = {"memory": least, "L2": case["moved"] / L2, "fma": case["fma"] / (REACHED * FMA),
             "tensor cores": case["tensor"] / (REACHED * TENSOR_CORES)}
    bound = max(times, key=times.get)
    return least / times[bound], bound


def traffic(profile):
    yield ("| kernel | case | bytes per element moved | least | share | predicted share of an H100's bandwidth | bound by |\n"
           "|---|---|---|---|---|---|---|")
    for name, figures in sorted(profile.items()):
        for case in figures.get("cases", []):
            moved, least = case["moved"], case["least"]
            share, bound = predict(case)
            yield f"| `{name}` | {case['case']} | {moved:.2f} | {least:.2f} | {least / moved:.2f} | {share:.2f} | {bound} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("fatbins", "cuobjdump", "output"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--profile")
    arguments = parser.parse_args()
    profile = json.loads(pathlib.Path(arguments.profile).read_text(encoding="utf-8")) if arguments.profile else {}
    kernels = collect(arguments, profile)
    lines = []
    for arch in sorted({kernel.arch for kernel in kernels}):
        lines += [f"\n## sm_{arch}\n", "| kernel | threads | registers | shared bytes | spills | occupancy | widest load/store | tensor-core products |",
                  "|---|---|---|---|---|---|---|---|"]
        lines += [kernel.row() for kernel in sorted(kernels, key=lambda k: k.name) if kernel.arch == arch]
    if profile:
        lines += ["\n## Global memory\n", *traffic(profile)]
    pathlib.Path(arguments.output).write_text("# The CUDA kernels as compiled\n" + "\n".join(lines) + "\n", encoding="utf-8")
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    print(*faults, sep="\n", end="\n" if faults else "")
    names, archs = {kernel.name for kernel in kernels}, {kernel.arch for kernel in kernels}
    print(f"{len(names)} kernels on {len(archs)} architectures, {len(faults)} faults: {arguments.output}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
