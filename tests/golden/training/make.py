"""Writes golden.safetensors: ten training steps of a small U-Net in PyTorch, by its own modules, autograd and optimizers.

    python make.py

Needs torch and safetensors. Weights and data are drawn here; single precision weights, all arithmetic in double, so that the
comparison shows one side's rounding only. The loss is the marginal cross-entropy plus Dice that `nn::marginal_loss`
documents, written with PyTorch's own softmax over the admissible classes of every voxel. Recorded: the first weights, each
step's loss and norm of gradients, the gradients of the first step and the last weights, for AdamW and for SGD.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

WIDTHS, CLASSES, SIDE, BATCH, STEPS = [4, 8], 3, 12, 2, 10


class DoubleConv(nn.Module):
    def __init__(self, ci, co):
        super().__init__()
        self.first, self.second = nn.Conv3d(ci, co, 3, padding=1), nn.Conv3d(co, co, 3, padding=1)
        self.first_norm, self.second_norm = (nn.InstanceNorm3d(co, affine=True) for _ in range(2))

    def forward(self, x):
        act = nn.LeakyReLU(0.01)
        return act(self.second_norm(self.second(act(self.first_norm(self.first(x))))))


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = DoubleConv(1, WIDTHS[0]), DoubleConv(WIDTHS[0], WIDTHS[1])
        self.up, self.join = nn.ConvTranspose3d(WIDTHS[1], WIDTHS[0], 2, 2), DoubleConv(2 * WIDTHS[0], WIDTHS[0])
        self.head = nn.Conv3d(WIDTHS[0], CLASSES, 1)

    def forward(self, x):
        skip = self.fine(x)
        return self.head(self.join(torch.cat([skip, self.up(self.coarse(nn.functional.max_pool3d(skip, 2)))], 1)))


NAMES = {"fine": "down.0", "coarse": "down.1", "up": "up.0.up", "join": "up.0.conv", "head": "head"}


def renamed(name):
    """The name of a parameter on the other side."""
    first, *rest = name.split(".")
    if rest and rest[-2:-1] and rest[-2].endswith("_norm"):
        rest[-1] = {"weight": "gamma", "bias": "beta"}[rest[-1]]
    return ".".join([NAMES[first], *rest])


def marginal_loss(logits, sets):
    """sets: admissible classes as bits, [B, D, H, W]."""
    chance = logits.softmax(1)
    bits = torch.stack([(sets >> c) & 1 for c in range(CLASSES)], 1).bool()
    admissible = (chance * bits).sum(1)
    known = bits.sum(1) == 1
    informed = ~bits.all(1)
    entropy = -admissible.log()[informed].mean()
    classes, dice = [], []
    for c in range(CLASSES):
        here = known & bits[:, c]
        if not here.any():
            continue
        classes.append(-chance[:, c].log()[here].mean())
        # Voxels that may be c and may be something else are left out.
        decided = here | ~bits[:, c]
        overlap, predicted = chance[:, c][here].sum(), chance[:, c][decided].sum()
        dice.append(1 - (2 * overlap + 1e-5) / (predicted + here.sum() + 1e-5))
    return (entropy + torch.stack(classes).mean()) / 2 + torch.stack(dice).mean()


def main():
    torch.manual_seed(0)
    first = Unet()
    images = torch.randn(STEPS, BATCH, 1, SIDE, SIDE, SIDE)
    # Mostly known voxels, some of two admissible classes, some of all.
    choices = torch.tensor([0b001, 0b010, 0b100, 0b011, 0b111])
    sets = choices[torch.multinomial(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]), STEPS * BATCH * SIDE**3, True)]
    sets = sets.reshape(STEPS, BATCH, SIDE, SIDE, SIDE)
    # Something to learn: class 2 is brighter.
    images = images + 1.5 * (sets == 0b100).unsqueeze(2)
    out = {"images": images, "sets": sets.to(torch.float32)}
    out.update({f"start/{renamed(name)}": value.detach().clone() for name, value in first.named_parameters()})
    for rule in ("adam", "sgd"):
        net = Unet().double()
        net.load_state_dict(first.state_dict())
        if rule == "adam":
            optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-5)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
        losses, norms = [], []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = marginal_loss(net(images[step].double()), sets[step])
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 12.0))
            losses.append(loss.detach())
            if step == 0 and rule == "adam":
                out.update({f"gradient/{renamed(n)}": p.grad.float().clone() for n, p in net.named_parameters()})
            optimizer.step()
        out[f"{rule}/losses"], out[f"{rule}/norms"] = torch.stack(losses).float(), torch.stack(norms).float()
        out.update({f"{rule}/end/{renamed(n)}": p.detach().float().clone() for n, p in net.named_parameters()})
    save_file(out, Path(__file__).with_name("golden.safetensors"))
    print({rule: out[f"{rule}/losses"].tolist() for rule in ("adam", "sgd")})


if __name__ == "__main__":
    main()
