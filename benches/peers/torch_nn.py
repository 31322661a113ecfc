"""Measures with PyTorch what `freetumor bench nn` measures: same names, shapes, rounds, threads.

python torch_nn.py [--json] [--rounds N] [--threads N] [--only NAME]...
python torch_nn.py --ratios [--rounds N] [--threads N]      # JSON: ours / PyTorch, see compare_nn.py
python torch_nn.py --device cuda:0 --bf16 --channels-last --compile      # PyTorch at its best on a GPU

On the CPU, eager mode in single precision: a compiled model needs a C++ compiler on the machine. Written out in plain
PyTorch, so that nothing else has to be installed; `--count` checks the networks' sizes and operations instead of
measuring.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

# A round shorter than this repeats its run.
MIN_ROUND_SECONDS = 0.1


class Double(nn.Sequential):
    """Twice convolution, instance norm, leaky ReLU."""

    def __init__(self, ci, co, slope):
        layers = []
        for i in (ci, co):
            layers += [nn.Conv3d(i, co, 3, padding=1), nn.InstanceNorm3d(co, affine=True), nn.LeakyReLU(slope, inplace=True)]
        super().__init__(*layers)


class Unet(nn.Module):
    """With widths 32, 32, 64, 128, 256 this is MONAI's BasicUNet(3, 1, 2), without dropout (MONAI's default is 0)."""

    def __init__(self, co, widths, slope):
        super().__init__()
        self.down = nn.ModuleList(Double(a, b, slope) for a, b in zip([1, *widths], widths))
        steps = list(zip(widths, widths[1:]))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in steps)
        self.conv = nn.ModuleList(Double(2 * a, a, slope) for a, _ in steps)
        self.head = nn.Conv3d(widths[0], co, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool3d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up, conv in zip(self.up, self.conv):
            x = conv(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class Pair(nn.Sequential):
    """Twice convolution, batch norm, ReLU; like the released code, the norm always takes the batch's statistics."""

    def __init__(self, ci, middle, co):
        layers = []
        for i, o in ((ci, middle), (middle, co)):
            layers += [nn.Conv3d(i, o, 3, padding=1), nn.BatchNorm3d(o, track_running_stats=False), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Published(nn.Module):
    """The released generator: 19.07 million parameters."""

    def __init__(self):
        super().__init__()
        widths = [(1, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512)]
        self.down = nn.ModuleList(Pair(*w) for w in widths)
        steps = [(512, 256), (256, 128), (128, 64)]
        self.up = nn.ModuleList(nn.ConvTranspose3d(a, a, 2, 2) for a, _ in steps)
        self.conv = nn.ModuleList(Pair(a + b, b, b) for a, b in steps)
        self.head = nn.Conv3d(64, 3, 1)

    def forward(self, x):
        skips = []
        for level, pair in enumerate(self.down):
            if level:
                skips.append(x)
                x = F.max_pool3d(x, 2)
            x = pair(x)
        for up, conv in zip(self.up, self.conv):
            x = conv(torch.cat([up(x), skips.pop()], 1))
        return torch.tanh(self.head(x))


class Compute:
    """Where and how the networks run."""

    def __init__(self, args):
        self.device, self.bf16, self.compile = torch.device(args.device), args.bf16, args.compile
        self.format = torch.channels_last_3d if args.channels_last else torch.contiguous_format

    def net(self, net):
        net = net.to(self.device, memory_format=self.format)
        return torch.compile(net) if self.compile else net

    def randn(self, *shape):
        return torch.randn(*shape, device=self.device).to(memory_format=self.format)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"


def operator(layer, shape):
    """Returns what prepares the forward run and the run of both directions."""

    def forward(compute):
        x, net = compute.randn(*shape), compute.net(layer)

        def run():
            with torch.no_grad(), compute.autocast():
                net(x)

        return run

    def both(compute):
        x, net = compute.randn(*shape).requires_grad_(), compute.net(layer)

        def run():
            layer.zero_grad()
            x.grad = None
            with compute.autocast():
                y = net(x)
            y.backward(torch.ones_like(y))

        return run

    return {"forward": forward, "both": both}


def network(make, co, side):
    """Returns what prepares inference and a training step."""

    def forward(compute):
        net, x = compute.net(make()), compute.randn(1, 1, side, side, side)

        def run():
            with torch.no_grad(), compute.autocast():
                net(x)

        return run

    def step(compute):
        net, x = compute.net(make()), compute.randn(1, 1, side, side, side)
        target = compute.randn(1, co, side, side, side)
        # The settings of our trainer; fused is PyTorch's fastest implementation.
        adam = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=1e-5, fused=True)

        def run():
            adam.zero_grad()
            with compute.autocast():
                y = net(x)
            F.mse_loss(y.float(), target).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 12.0)
            adam.step()

        return run

    return {"forward": forward, "step": step}


def norm_act(channels):
    return nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(0.01, inplace=True))


NETWORKS = {
    "demo_unet_64": (lambda: Unet(7, [12, 24, 48, 64], 0.01), 7, 64),
    "basicunet_96": (lambda: Unet(2, [32, 32, 64, 128, 256], 0.1), 2, 96),
    "generator_96": (Published, 3, 96),
}


def entries():
    found = {}
    for c, side in [(128, 12), (64, 24), (32, 48), (16, 96)]:
        found[f"conv3d_c{c}_{side}"] = operator(nn.Conv3d(c, c, 3, padding=1), (1, c, side, side, side))
    found["conv1_c32_48"] = operator(nn.Conv3d(32, 32, 1), (1, 32, 48, 48, 48))
    for c, side in [(64, 24), (32, 48)]:
        halving = nn.Conv3d(c, 2 * c, 3, stride=2, padding=1)
        found[f"conv3d_s2_c{c}_{side}"] = operator(halving, (1, c, side, side, side))
    for c, side in [(128, 6), (64, 12), (32, 24)]:
        found[f"transposed_c{c}_{side}"] = operator(nn.ConvTranspose3d(c, c, 2, 2), (1, c, side, side, side))
    found["norm_act_c32_48"] = operator(norm_act(32), (1, 32, 48, 48, 48))
    found["max_pool_c32_48"] = operator(nn.MaxPool3d(2), (1, 32, 48, 48, 48))
    found["nearest_c32_24"] = operator(nn.Upsample(scale_factor=2), (1, 32, 24, 24, 24))
    found["trilinear_c32_24"] = operator(nn.Upsample(scale_factor=2, mode="trilinear"), (1, 32, 24, 24, 24))
    for name, (make, co, side) in NETWORKS.items():
        found[name] = network(make, co, side)
    return {f"{name}_{kind}": prepare for name, kinds in found.items() for kind, prepare in kinds.items()}


def one_round(run, compute):
    start, runs = time.perf_counter(), 0
    while True:
        run()
        compute.wait()
        runs += 1
        elapsed = time.perf_counter() - start
        if elapsed >= MIN_ROUND_SECONDS:
            return 1e3 * elapsed / runs


def status_mib(key):
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def measure(prepare, rounds, compute):
    """Returns the median milliseconds, and the process's memory before the entry and at its peak."""
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
        refs.write("5")
    before = status_mib("VmRSS")
    run = prepare(compute)
    run()
    times = sorted(one_round(run, compute) for _ in range(rounds))
    memory = {"resident_before_mib": before, "peak_memory_mib": status_mib("VmHWM")}
    if compute.device.type == "cuda":
        memory["device_memory_mib"] = torch.cuda.max_memory_reserved(compute.device) / (1 << 20)
    return {"milliseconds": times[len(times) // 2], **memory}


def count():
    """Prints each network's parameters and the multiply-adds of its convolutions, counted by hooks."""
    for name, (make, _, _) in NETWORKS.items():
        net, sums = make(), [0]

        def hook(module, inputs, output):
            taken = output if isinstance(module, nn.Conv3d) else inputs[0]
            sums[0] += module.weight.numel() * taken[0, 0].numel()

        for module in net.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                module.register_forward_hook(hook)
        with torch.no_grad():
            net(torch.zeros(1, 1, 32, 32, 32))
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{name}: {parameters} parameters, {sums[0]} multiply-adds at 32^3")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", default=[], help="measure entries whose names begin so")
    parser.add_argument("--count", action="store_true", help="count parameters and multiply-adds")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:N")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true", help="channels_last_3d")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--ratios", action="store_true", help="measure both in turn and print ours / PyTorch as JSON")
    args = parser.parse_args()
    if args.ratios:
        compare = str(Path(__file__).with_name("compare_nn.py"))
        passed = ["--json", "--python", sys.executable, "--rounds", str(args.rounds), "--threads", str(args.threads)]
        return os.execv(sys.executable, [sys.executable, compare, *passed])
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.count:
        return count()
    compute = Compute(args)
    result = {"version": torch.__version__, "device": compute.name(), "threads": args.threads, "rounds": args.rounds}
    result["entries"] = []
    for name, prepare in entries().items():
        if args.only and not any(name.startswith(only) for only in args.only):
            continue
        print(name, file=sys.stderr)
        result["entries"].append({"name": name, **measure(prepare, args.rounds, compute)})
    if args.json:
        print(json.dumps(result, indent=2))
        return None
    print(f"PyTorch {result['version']} on {compute.name()}, {args.threads} threads, medians of {args.rounds} rounds")
    for entry in result["entries"]:
        print(f"{entry['name']:26} {entry['milliseconds']:10.2f} ms {entry['peak_memory_mib']:8.0f} MiB")
    return None


if __name__ == "__main__":
    main()
