"""Runs `freetumor bench nn` and torch_nn.py in turn and prints how they compare: ours / PyTorch, below 1 is faster.

python compare_nn.py [--json] [--rounds N] [--threads N] [--binary FILE] [--python FILE] [--preload FILE]...

Each round starts both programs once, one after the other, so that a slow minute of the machine hits both; an entry's time
is the median over the rounds. PyTorch runs with the allocator that is fastest for a training step of the basic U-Net: glibc as
it comes, glibc that keeps what it has freed, glibc with huge pages, and every allocator given by --preload. Ours is
linked into the binary. Peak memory is VmHWM of a process that ran only the training step, once in all and once above
what was resident before it (PyTorch's libraries alone may take hundreds of MiB).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(64 << 20)}
ALLOCATORS = {
    "glibc": {},
    "glibc that keeps": KEEP,
    "glibc that keeps, huge pages": {**KEEP, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
# The entries that are compared, by the name of their ratio.
RATIOS = {
    "basicunet_forward": "basicunet_96_forward",
    "basicunet_step": "basicunet_96_step",
    "conv3d_c16_96_both": "conv3d_c16_96_both",
    "conv3d_c32_48_both": "conv3d_c32_48_both",
    "norm_act_both": "norm_act_c32_48_both",
    "generator_forward": "generator_96_forward",
}
STEP = "basicunet_96_step"


def run(command, names, rounds, threads, environment):
    """Runs one side once; returns its entries by name."""
    command = [*command, "--json", "--rounds", str(rounds), "--threads", str(threads)]
    for name in names:
        command += ["--only", name]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return {entry["name"]: entry for entry in json.loads(done.stdout)["entries"]}


def choose_allocator(torch, allocators, threads):
    """Returns the name of the allocator with the fastest step, and what was measured with every one."""
    tried = {}
    for name, environment in allocators.items():
        entry = tried[name] = run(torch, [STEP], 3, threads, environment)[STEP]
        print(f"PyTorch with {name}: {entry['milliseconds']:.0f} ms, {entry['peak_memory_mib']:.0f} MiB", file=sys.stderr)
    best = min(tried, key=lambda name: tried[name]["milliseconds"])
    return best, tried


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the ratios alone, as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--binary", default=str(HERE.parents[1] / "target/release/freetumor"))
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--preload", action="append", default=[], help="a shared library with an allocator to try")
    parser.add_argument("--everything", action="store_true", help="compare every entry, not only the ratios' ones")
    return parser.parse_args()


def main():
    args = parse()
    ours = [args.binary, "bench", "nn"]
    torch = [args.python, str(HERE / "torch_nn.py")]
    allocators = dict(ALLOCATORS)
    for library in args.preload:
        allocators[Path(library).name] = {"LD_PRELOAD": library}
    best, tried = choose_allocator(torch, allocators, args.threads)

    names = [] if args.everything else list(RATIOS.values())
    times = {}
    for number in range(args.rounds):
        print(f"round {number + 1}/{args.rounds}", file=sys.stderr)
        for side, command, environment in (("ours", ours, {}), ("torch", torch, allocators[best])):
            for name, entry in run(command, names, 1, args.threads, environment).items():
                times.setdefault(name, {"ours": [], "torch": []})[side].append(entry["milliseconds"])
    medians = {name: {side: statistics.median(found) for side, found in sides.items()} for name, sides in times.items()}
    alone = {"ours": run(ours, [STEP], 3, args.threads, {})[STEP], "torch": tried[best]}
    peak = {side: entry["peak_memory_mib"] for side, entry in alone.items()}
    above = {side: peak[side] - entry["resident_before_mib"] for side, entry in alone.items()}

    ratios = {name: medians[entry]["ours"] / medians[entry]["torch"] for name, entry in RATIOS.items()}
    ratios["step_peak_memory"] = peak["ours"] / peak["torch"]
    ratios["step_peak_memory_above_start"] = above["ours"] / above["torch"]
    if args.json:
        print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}, indent=2))
        return
    print(f"{args.threads} threads, medians of {args.rounds} rounds, PyTorch with {best}\n")
    print(f"{'entry':26} {'ours ms':>10} {'PyTorch ms':>11} {'ratio':>6}")
    for name, sides in medians.items():
        print(f"{name:26} {sides['ours']:10.2f} {sides['torch']:11.2f} {sides['ours'] / sides['torch']:6.2f}")
    for what, memory in (("peak MiB of the step", peak), ("of which above the start", above)):
        print(f"{what:26} {memory['ours']:10.0f} {memory['torch']:11.0f} {memory['ours'] / memory['torch']:6.2f}")


if __name__ == "__main__":
    main()
