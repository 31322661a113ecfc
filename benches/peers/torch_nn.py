"""Times with PyTorch on the CPU what benches/kernel.rs times: python torch_nn.py [threads]."""
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
torch.manual_seed(0)


def report(name, run, repeats=10):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(f"{name:40} {1e3 * sorted(times)[repeats // 2]:9.2f} ms")


class DoubleConv(nn.Sequential):
    def __init__(self, ci, co):
        layers = []
        for i in (ci, co):
            layers += [nn.Conv3d(i, co, 3, padding=1), nn.InstanceNorm3d(co, affine=True), nn.LeakyReLU(0.01)]
        super().__init__(*layers)


class Unet(nn.Module):
    def __init__(self, ci, co, widths):
        super().__init__()
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip([ci, *widths], widths))
        steps = list(zip(widths, widths[1:]))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in steps)
        self.conv = nn.ModuleList(DoubleConv(2 * a, a) for a, _ in steps)
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


def main():
    print(torch.__version__, torch.get_num_threads(), "threads")
    for channels, side in [(16, 48), (32, 24), (64, 12)]:
        x = torch.randn(2, channels, side, side, side, requires_grad=True)
        conv = nn.Conv3d(channels, channels, 3, padding=1)
        norm = nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(0.01))
        for kind, layer in (("conv3d", conv), ("norm", norm)):
            name = f"{kind} c{channels} 2x{side}^3"
            report(f"{name} forward", lambda: layer(x))
            report(f"{name} both ways", lambda: layer(x).sum().backward())
    net, x = Unet(1, 3, [16, 32, 64]), torch.randn(2, 1, 48, 48, 48)
    with torch.no_grad():
        report("unet 2x48^3 inference", lambda: net(x))
    report("unet 2x48^3 both ways", lambda: net(x).square().mean().backward())


main()
