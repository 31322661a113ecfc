"""MONAI: a stream as dictionary items, beside what ``CacheDataset`` and ``LoadImaged`` make of files.

>>> data = StreamItems("http://127.0.0.1:8080", batch_size=2, transform=RandFlipd(("image", "label")))    # doctest: +SKIP
>>> loader = monai.data.DataLoader(data, batch_size=2)                                                    # doctest: +SKIP
"""

# MONAI carries few types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor

from .meta import PatchMeta
from .torch import Item, StreamDataset

_SPATIAL = (0, 3, 2, 1)


class StreamItems(StreamDataset):
    """One dictionary for each patch: ``image``, ``label`` and the asked-for ``outputs`` as ``MetaTensor``.

    Tensors are ``[1, X, Y, Z]``, growing to Right, Anterior, Superior; their ``affine`` leads from (x, y, z) indices to RAS
    mm, also after the server's augmentation. ``image`` is f32 in [0, 1] unless ``image=`` asks for another type; ``label``
    is u8 with 255 for *ignore*. ``meta`` has ``index``, ``case``, ``organ``, ``pool``, ``outcome`` beside MONAI's own keys.

    Give the loader the same ``batch_size``: which patches form a step, how ranks and workers share them, epochs and
    resuming are those of :class:`freetumor.torch.StreamDataset`.
    """

    def __init__(
        self, url: str, recipe: Mapping[str, Any] | None = None, *, transform: Callable[[Item], Any] | None = None, **options: Any
    ) -> None:
        """Takes what :class:`freetumor.torch.StreamDataset` takes, and a MONAI transform for each item."""
        everything: dict[str, Any] = {**options, "with_meta": True}
        super().__init__(url, recipe, **everything)
        self.transform = transform

    def __len__(self) -> int:
        """Returns this rank's patches in the current epoch."""
        return super().__len__() * self._batch_size

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: where it begins is decided now.
        return self._patches(super().__iter__())

    def _patches(self, batches: Iterator[Item]) -> Iterator[Any]:
        for batch in batches:
            metas: list[PatchMeta] = batch.pop("meta")
            for i, meta in enumerate(metas):
                item = {name: meta_tensor(tensor[i], meta) for name, tensor in batch.items()}
                yield item if self.transform is None else self.transform(item)


def meta_tensor(tensor: torch.Tensor, meta: PatchMeta) -> MetaTensor:
    """Returns a ``[1, D, H, W]`` tensor of a patch as ``[1, X, Y, Z]`` with its affine."""
    turned = tensor.permute(*_SPATIAL).contiguous()
    affine = torch.from_numpy(np.ascontiguousarray(meta.affine[:, [2, 1, 0, 3]]))
    about = {
        "filename_or_obj": f"{meta.case}#{meta.index}", "original_affine": affine.clone(), "space": "RAS",
        "spatial_shape": np.array(turned.shape[1:]), "original_channel_dim": 0,
        "index": meta.index, "case": meta.case, "organ": meta.organ, "pool": meta.pool, "outcome": meta.outcome,
    }
    return MetaTensor(turned, affine=affine, meta=about)
