"""Makes networks of other programs with random weights, saves them as those programs do, and stores what they compute.

    python make.py              the small files in this folder
    python make.py --full DIR   networks of the published sizes, which tests/import.rs compares when asked to

Needs torch, monai >= 1.5 (whose patch merging is the corrected one) and nnunetv2.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import SwinUNETR, UNet
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent


def randomise(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter, norms included, so that none can hide behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (2.0 / parameter[0].numel()) ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return net.eval()


def image(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Intensities in [0, 1], multiples of 1/256."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 257, shape, generator=generator).float() / 256


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def by_name(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Makes numbers that follow from a name; tests/common/formula.rs makes the same."""
    j = np.arange(np.prod(shape), dtype=np.uint64)
    a = (j * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) % np.uint64(1 << 32)
    t = 2.0 * (a.astype(np.float64) / 4294967296.0) - 1.0
    if len(shape) > 1:
        value = t * np.sqrt(3.0 / np.prod(shape[1:]))
    elif name.endswith(".weight"):
        value = 1 + 0.1 * t
    else:
        value = 0.1 * t
    return value.astype(np.float32).reshape(shape)


def formula(net: torch.nn.Module) -> torch.nn.Module:
    """Sets parameters that a test can make from their names, where a file of them would be large."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.from_numpy(by_name(name, tuple(parameter.shape))))
    return net.eval()


def hooked(net: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the outputs of a SwinUNETR's layers and the logits."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, y, name=name: seen.__setitem__(name, y.clone()))
        for name, module in net.named_children()
        if name.startswith(("encoder", "decoder"))
    ]
    transformer = net.swinViT
    states = [transformer.patch_embed] + [getattr(transformer, f"layers{i}")[0] for i in range(1, 5)]
    for i, module in enumerate(states):
        handles.append(module.register_forward_hook(lambda _m, _i, y, i=i: seen.__setitem__(f"hidden{i}", y.clone())))
    with torch.no_grad():
        seen["logits"] = net(x)
    for handle in handles:
        handle.remove()
    return seen


def swin(feature_size: int, side: int, thin: int, seed: int | None) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Makes a SwinUNETR v2; every layer's output is kept at every `thin`-th voxel, of small grids at every third."""
    net = SwinUNETR(in_channels=1, out_channels=3, feature_size=feature_size, use_v2=True)
    net = formula(net) if seed is None else randomise(net, seed)
    x = image((1, 1, side, side, side), 1)
    if seed is None:
        # A test can make it too, so that the file need not hold it.
        x = (torch.from_numpy(by_name("x", (side**3,))) * 5 + 0.5).reshape(x.shape)
    arrays = {} if seed is None else {"x": numbers(x)}
    for name, y in hooked(net, x).items():
        step = thin if y.shape[-1] > 8 else min(thin, 3) if y.shape[-1] > 4 else 1
        arrays[name] = numbers(y[..., ::step, ::step, ::step])
    return net, arrays


def plans(network: str, stages: dict) -> dict:
    """A plans file as nnU-Net 2.8 writes it, its axes turned and its configuration inheriting."""
    kwargs = {
        "n_stages": len(stages["features_per_stage"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **stages,
    }
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 32, 64],
        "median_image_size_in_voxels": [20.0, 20.0, 30.0],
        "spacing": [3.0, 0.9, 0.7],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": architecture,
        "batch_dice": False,
    }
    intensity = {"max": 812.0, "mean": 61.5, "median": 60.0, "min": -950.0, "percentile_00_5": -97.0,
                 "percentile_99_5": 214.0, "std": 43.25}
    return {
        "dataset_name": "Dataset901_Small",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 0.9, 0.7],
        "original_median_shape_after_transp": [20, 20, 30],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "configurations": {"3d_base": full, "3d_fullres": {"inherits_from": "3d_base", "batch_size": 3}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensity},
    }


DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "liver_tumour": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def nnunet(out: Path, name: str, network: str, stages: dict, seed: int, size: tuple[int, int, int]) -> None:
    """Saves a checkpoint with nnU-Net's own trainer, and the logits of every resolution in nnU-Net's order of axes."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    description = plans(network, stages)
    # The trainer takes the last key out of its plans.
    trainer = nnUNetTrainer({**description, "continue_training": False}, "3d_fullres", 0, DATASET, torch.device("cpu"))
    # It looks at the kind of the preprocessed cases before it makes the network.
    preprocessed = Path(trainer.preprocessed_dataset_folder)
    preprocessed.mkdir(parents=True, exist_ok=True)
    (preprocessed / "case.b2nd").touch()
    trainer.initialize()
    net = randomise(trainer.network, seed)
    trainer.save_checkpoint(str(out / f"{name}.pth"))
    (out / f"{name}.plans.json").write_text(json.dumps(description, indent=1) + "\n")
    x = image((1, 1, *size), 2)
    hu = x * 425 - 175
    intensity = description["foreground_intensity_properties_per_channel"]["0"]
    clipped = hu.clamp(intensity["percentile_00_5"], intensity["percentile_99_5"])
    with torch.no_grad():
        net.decoder.deep_supervision = True
        outputs = net((clipped - intensity["mean"]) / intensity["std"])
    arrays = {"x": numbers(x)} | {f"logits{i}": numbers(y) for i, y in enumerate(outputs)}
    arrays["parameters"] = np.array([sum(p.numel() for p in net.parameters())], np.float32)
    save_file(arrays, out / f"{name}.safetensors")


PLAIN = {
    "features_per_stage": [4, 6, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 1],
}
RESIDUAL = {
    "features_per_stage": [4, 6, 6],
    "kernel_sizes": [[3, 3, 3], [1, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_blocks_per_stage": [1, 2, 2],
    "n_conv_per_stage_decoder": [1, 1],
}
# What nnU-Net 2.8 plans for LiTS-like CTs and for 24 GB with its residual-encoder planner (L).
FULL_PLAIN = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3 + [[1, 2, 2]] * 2,
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}
FULL_RESIDUAL = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[1, 3, 3]] + [[3, 3, 3]] * 5,
    "strides": [[1, 1, 1], [1, 2, 2]] + [[2, 2, 2]] * 3 + [[1, 2, 2]],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
}


def monai_unet(out: Path, name: str, widths: tuple[int, ...], units: int, seed: int, strides: tuple[int, ...] = (2, 2)) -> None:
    """Saves MONAI's UNet as a trainer of MONAI Core does."""
    net = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=widths, strides=strides, num_res_units=units)
    net = randomise(net, seed)
    torch.save({"model": net.state_dict()}, out / f"{name}.pt")
    x = image((1, 1, 8, 12, 16), 11)
    with torch.no_grad():
        arrays = {"x": numbers(x), "logits": numbers(net(x))}
    arrays["parameters"] = np.array([sum(p.numel() for p in net.parameters())], np.float32)
    save_file(arrays, out / f"{name}.safetensors")


class ConvPair(torch.nn.Module):
    """Two convolutions of the published networks; their norms use the batch's statistics whenever they are applied."""

    class Op(torch.nn.Module):
        def __init__(self, channels: tuple[int, int]) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv3d(*channels, 3, padding=1)
            self.bn1 = torch.nn.BatchNorm3d(channels[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.batch_norm(self.conv1(x), None, None, self.bn1.weight, self.bn1.bias, training=True)
            return torch.relu(y)

    def __init__(self, first: int, middle: int, last: int) -> None:
        super().__init__()
        self.ops = torch.nn.Sequential(self.Op((first, middle)), self.Op((middle, last)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops(x)


class UpStep(torch.nn.Module):
    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.up_conv = torch.nn.ConvTranspose3d(coarse, coarse, 2, stride=2)
        self.ops = ConvPair(coarse + fine, fine, fine).ops

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.ops(torch.cat((self.up_conv(x), skip), 1))


class Head(torch.nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.final_conv = torch.nn.Conv3d(64, outputs, 1)


class Published(torch.nn.Module):
    """The published generator or discriminator under its names."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.down_tr64, self.down_tr128 = ConvPair(1, 32, 64), ConvPair(64, 64, 128)
        self.down_tr256, self.down_tr512 = ConvPair(128, 128, 256), ConvPair(256, 256, 512)
        self.up_tr256, self.up_tr128, self.up_tr64 = UpStep(512, 256), UpStep(256, 128), UpStep(128, 64)
        self.out_tr = Head(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = torch.nn.functional.max_pool3d
        a = self.down_tr64(x)
        b = self.down_tr128(pool(a, 2))
        c = self.down_tr256(pool(b, 2))
        x = self.up_tr256(self.down_tr512(pool(c, 2)), c)
        return self.out_tr.final_conv(self.up_tr64(self.up_tr128(x, b), a))


class Tgan(torch.nn.Module):
    """The three networks of the published file."""

    def __init__(self, segmentor: torch.nn.Module) -> None:
        super().__init__()
        self.netG, self.netD = randomise(Published(3), 8), randomise(Published(3), 9)
        self.netSeg = segmentor


class Hostile:
    """Calls a function when Python reads it."""

    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.victim}",)


def small() -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Hostile("executed")}, HERE / "hostile.pt")
    nnunet(HERE, "plain", "PlainConvUNet", PLAIN, 3, (8, 12, 16))
    nnunet(HERE, "residual", "ResidualEncoderUNet", RESIDUAL, 4, (8, 12, 16))
    (HERE / "dataset.json").write_text(json.dumps(DATASET, indent=1) + "\n")
    monai_unet(HERE, "monai_residual", (3, 4, 6), 2, 12)
    monai_unet(HERE, "monai_plain", (3, 4, 6), 0, 13)
    monai_unet(HERE, "monai_strides", (3, 4, 6), 0, 13, strides=(1, 2))
    _, arrays = swin(12, 64, 7, None)
    save_file(arrays, HERE / "swin_unetr.safetensors")


def full(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    net, arrays = swin(48, 64, 1, 5)
    print("SwinUNETR", sum(p.numel() for p in net.parameters()))
    torch.save({"epoch": 7, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, out / "swin.pt")
    save_file(arrays, out / "swin.safetensors")
    tgan = Tgan(net)
    torch.save({f"module.{k}": v for k, v in tgan.state_dict().items()}, out / "tgan.pt")
    x = image((1, 1, 32, 32, 32), 10)
    with torch.no_grad():
        save_file({"x": numbers(x), "y": numbers(torch.tanh(tgan.netG(x)))}, out / "generator.safetensors")
    nnunet(out, "plain", "PlainConvUNet", FULL_PLAIN, 6, (16, 64, 64))
    nnunet(out, "residual", "ResidualEncoderUNet", FULL_RESIDUAL, 7, (16, 64, 64))
    (out / "dataset.json").write_text(json.dumps(DATASET))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, metavar="DIR")
    target = parser.parse_args().full
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ.setdefault(name, folder)
        os.environ["nnUNet_compile"] = "f"
        small() if target is None else full(target)


if __name__ == "__main__":
    main()
