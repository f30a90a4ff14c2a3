"""Training methods of weakly-supervised localization: Hide-and-Seek on images, attention-based dropout in the backbone,
and self-produced guidance of its stages.

CutMix is part of `calm.data.transforms.BatchMix`, and ACoL, which changes the model, is `calm.acol`. The options of all
are `calm.config.WsolOptions`. They act in training mode alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from calm.backbones.released import VGG16, InceptionV3, ResNet50
from calm.backbones.small import SmallResNet
from calm.backbones.timm_models import TimmBackbone
from calm.config import WsolOptions
from calm.data.records import first_of
from calm.errors import CalmError
from calm.heatmaps import resize_and_normalize
from calm.inference import evaluation_mode, seeded
from calm.output import MAP_KINDS, CalmOutput, CamOutput


def hide_patches(
    images: Float[Tensor, "b c H W"], patches: Sequence[int], rate: float, *seed: int
) -> Float[Tensor, "b c H W"]:
    """Return images of which random square patches are filled with the batch's mean of each channel.

    Each image is divided into patches of one side, drawn from ``patches`` for it; the last row and column may be cut.
    Each patch is hidden with probability ``rate``. The random numbers depend on ``seed`` alone.

    Source: Singh and Lee, "Hide-and-Seek: Forcing a Network to be Meticulous for Weakly-supervised Object and Action
    Localization", ICCV 2017, section 3.1: sides of 16, 32, 44 and 56 pixels of 224, rate 0.5, and the mean over the
    training set. Choe et al. (2020) search side and rate; their defaults are 4 pixels, 0.5 and ImageNet's mean, 0.
    """
    count, _, height, width = images.shape
    hidden = torch.zeros(count, 1, height, width, dtype=torch.bool)
    with seeded(*seed):
        chosen = torch.randint(len(patches), (count, 1, 1, 1))
        for number, side in enumerate(patches):
            grid = torch.rand(count, 1, -(-height // side), -(-width // side)) < rate
            pixels = grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)[..., :height, :width]
            hidden |= pixels & (chosen == number)
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    return torch.where(hidden.to(images.device, non_blocking=True), mean, images)


def drop_by_attention(features: Float[Tensor, "b d h w"], rate: float, threshold: float) -> Float[Tensor, "b d h w"]:
    """Return features times their attention's drop mask, with probability ``rate``, or else times their importance.

    The attention A is the mean over the channels. The drop mask is 1 where A < threshold * max A, else 0, and hides the
    most telling part; the importance is sigmoid(A). One draw, by torch's global generator, is for the whole batch.

    Source: Choe and Shim, "Attention-based Dropout Layer for Weakly Supervised Object Localization", CVPR 2019, section
    3; its rate of 0.75 and threshold of 0.9 are the defaults of Choe et al. (2020), too, who search both.
    """
    attention = features.mean(dim=1, keepdim=True)
    drop = (attention < threshold * attention.amax(dim=(-2, -1), keepdim=True)).to(features.dtype)
    return features * torch.where(torch.rand((), device=features.device) < rate, drop, attention.sigmoid())


def add_attention_dropout(backbone: nn.Module, options: WsolOptions, shape: tuple[int, int, int]) -> list[str]:
    """Let parts of a backbone pass on `drop_by_attention` of their outputs in training mode, and return their names.

    Args:
        backbone: gets hooks; its state dict stays as it is.
        options: name the parts; without names they are those of `dropout_layers`.
        shape: (channels, height, width) of the images.

    Raises:
        CalmError: there is no such part, or its output is no grid (B, D, h, w).
    """
    names = options.adl_layers or dropout_layers(backbone)
    grids(backbone, names, shape, "attention-based dropout (adl)", "wsol.adl_layers")
    for name in names:
        drop = partial(_drop, rate=options.adl_rate, threshold=options.adl_threshold)
        backbone.get_submodule(name).register_forward_hook(drop)
    return list(names)


def grids(
    backbone: nn.Module, names: Sequence[str], shape: tuple[int, int, int], method: str, option: str
) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) of what parts of a backbone pass on, of an image of ``shape`` (C, H, W).

    Raises:
        CalmError: there is no such part, or its output is no grid (B, D, h, w); ``method`` and ``option`` are for the
            message.
    """
    parts = dict(backbone.named_modules())
    for name in names:
        if name not in parts:
            close = get_close_matches(name, parts, n=3) or [child for child, _ in backbone.named_children()]
            raise CalmError(f"{option}: the backbone has no part {name!r}; there are {first_of(close)}, ...")
    last = getattr(getattr(backbone, "model", backbone), "output_fmt", "NCHW") != "NCHW"
    shapes: dict[str, Any] = {}
    hooks = [parts[name].register_forward_hook(partial(_record, shapes, name)) for name in names]
    try:
        with evaluation_mode(backbone), torch.no_grad():
            backbone(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if last or len(shapes.get(name, ())) != 4:
            found = "channels last" if last else f"shape {shapes.get(name, 'none: it is not run')}"
            fix = f"name parts that return (B, D, h, w) in {option}, or choose a convolutional backbone"
            raise CalmError(f"{method} is for grids of features; part {name!r} has {found}: {fix}")
    return [shapes[name][1:] for name in names]


def dropout_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the parts that attention-based dropout follows by default.

    Those of the released architectures are Choe et al.'s (2020); of others it is the last two stages.

    Raises:
        CalmError: the backbone is the user's own, or a timm model that does not say what its stages are.
    """
    match backbone:
        case ResNet50():
            return ["layer3.0", "layer4.0", "layer4.2"]
        case InceptionV3():
            return ["Mixed_5d", "Mixed_6e", "A3_2b"]
        case VGG16():  # the third pooling, and the ReLU of the last convolution of the blocks conv4 and conv5
            names = [name for name, part in backbone.features.named_children() if isinstance(part, nn.MaxPool2d)]
            relus = [name for name, part in backbone.features.named_children() if isinstance(part, nn.ReLU)]
            return [f"features.{name}" for name in (names[2], relus[9], relus[12])]
        case SmallResNet():
            return [f"stages.{number}" for number in range(len(backbone.stages))[-2:]]
        case TimmBackbone() if stages_of := getattr(backbone.model, "feature_info", None):
            stages = [info["module"] for info in stages_of]
            return [f"model.{name}" for name in stages[-2:]]
    raise CalmError(
        "attention-based dropout (adl) has no default place in this backbone: name parts in wsol.adl_layers"
    )


def guided_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the two parts whose features self-produced guidance (SPG) teaches by default.

    Those of the released architectures are Choe et al.'s (2020); of others they are the two stages before the last.

    Raises:
        CalmError: the backbone is the user's own, or a timm model that does not say what its stages are.
    """
    match backbone:
        case ResNet50():
            return ["layer3.0", "layer3"]
        case InceptionV3():
            return ["Mixed_5d", "Mixed_6e"]
        case VGG16():  # the last parts of the blocks conv4, with its pooling if there is one, and conv5
            convolutions = [number for number, part in enumerate(backbone.features) if isinstance(part, nn.Conv2d)]
            return [f"features.{convolutions[10] - 1}", f"features.{len(backbone.features) - 1}"]
        case SmallResNet():
            return ["stem", *(f"stages.{number}" for number in range(len(backbone.stages)))][-3:-1]
        case TimmBackbone() if stages_of := getattr(backbone.model, "feature_info", None):
            return [f"model.{info['module']}" for info in stages_of][-3:-1]
    raise CalmError(
        "self-produced guidance (spg) has no default place in this backbone: name two parts in wsol.spg_layers"
    )


class SelfProducedGuidance(nn.Module):
    """The branches of SPG, which learn where the object is from masks that the network makes itself; in training alone.

    B1 and B2 read two stages of the backbone and C its features; each scores every location by 3x3 convolutions, of
    which B1 and B2 share the last. The label's map, min-max normalised, teaches B2; what B2 says teaches B1; and the
    mean of B1 and B2 teaches C. A teacher's pixels above one threshold are foreground, those below another background,
    and the others do not count. No gradient flows into a teacher. The trained model has none of the branches.

    Source: Zhang, Wei, Kang, Yang, Huang, "Self-produced Guidance for Weakly-supervised Object Localization", ECCV
    2018, section 3. Places, thresholds, convolutions and the rule for masks with little foreground (`seeds`) are those
    of Choe et al. (2020), except that all branches have the same channels. Maps of CALM's heads as teachers are ours.

    Args:
        backbone: gets hooks; its state dict stays as it is.
        options: name the parts, thresholds and channels.
        shape: (channels, height, width) of the images.

    Attributes:
        layers: names of the parts that B1 and B2 read.

    Raises:
        CalmError: as `grids`, or the backbone has no default place.
    """

    def __init__(self, backbone: nn.Module, options: WsolOptions, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = options.spg_layers or guided_layers(backbone)
        places = [*self.layers, ""]  # the last is the whole backbone
        channels = [
            grid[0] for grid in grids(backbone, places, shape, "self-produced guidance (spg)", "wsol.spg_layers")
        ]
        width = options.spg_channels or min(512, channels[1])
        self.convolutions = nn.ModuleList(nn.Conv2d(count, width, 3, padding=1) for count in channels)
        self.shared = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.last = nn.Conv2d(width, 1, 1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.xavier_uniform_(part.weight)
                assert part.bias is not None
                nn.init.zeros_(part.bias)
        self.cuts = [
            (getattr(options, f"spg_foreground_{branch}"), getattr(options, f"spg_background_{branch}"))
            for branch in ("b2", "b1", "c")
        ]
        self._features: dict[int, Tensor] = {}
        for number, name in enumerate(places):
            backbone.get_submodule(name).register_forward_hook(partial(_keep, self._features, number))

    def forward(self, output: CalmOutput | CamOutput, targets: Tensor, size: tuple[int, int]) -> Float[Tensor, ""]:
        """Return the branches' loss for the latest batch that passed the backbone: the sum of three cross-entropies.

        Args:
            output: the heads' of that batch.
            targets: the labels, (B,), or (B, C) rows of probabilities, of which the largest counts.
            size: (height, width) of the images, at which masks and scores are compared.
        """
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        hidden = [conv(self._features.pop(number)).relu() for number, conv in enumerate(self.convolutions)]
        b1, b2, c = (
            interpolate(score, size, mode="bilinear").squeeze(1)
            for score in (self.shared(hidden[0]), self.shared(hidden[1]), self.last(hidden[2]))
        )
        with torch.no_grad():
            attention = MAP_KINDS[output.default_kind].read(output, labels[:, None]).squeeze(1)
            attention = resize_and_normalize(attention, size, "minmax")
            said = b1.float().sigmoid(), b2.float().sigmoid()
            masks = [
                seeds(*each) for each in zip((attention, said[1], (said[0] + said[1]) / 2), self.cuts, strict=True)
            ]
        losses = [seed_loss(score, mask) for score, mask in zip((b2, b1, c), masks, strict=True)]
        return torch.stack(losses).sum()


FEWEST = 30
"""Pixels of foreground that a mask of SPG has to have; with fewer, those above `RELATIVE` times its maximum are it."""
RELATIVE = 0.7


def seeds(scores: Float[Tensor, "b h w"], cuts: tuple[float, float]) -> Float[Tensor, "b h w"]:
    """Return a mask of scores in [0, 1]: 1 above the first of ``cuts``, 0 below the second, and NaN between."""
    high, low = cuts
    few = (scores > high).sum(dim=(1, 2), keepdim=True) < FEWEST
    foreground = scores > torch.where(few, RELATIVE * scores.amax(dim=(1, 2), keepdim=True), high)
    mask = torch.full_like(scores, torch.nan).masked_fill(foreground, 1.0)
    return mask.masked_fill(scores < low, 0.0)


def seed_loss(scores: Float[Tensor, "b h w"], mask: Float[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of scores (logits), mean over the pixels whose mask is no NaN; 0 without any."""
    known = ~mask.isnan()
    each = binary_cross_entropy_with_logits(scores.float(), mask.nan_to_num(0.0), known.float(), reduction="sum")
    return each / known.sum().clamp(min=1)


def _keep(features: dict[int, Tensor], number: int, part: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():  # not those of a teacher or of validation
        features[number] = output


def _record(shapes: dict[str, Any], name: str, part: nn.Module, inputs: Any, output: Any) -> None:
    shapes[name] = tuple(getattr(output, "shape", ()))


def _drop(part: nn.Module, inputs: Any, output: Tensor, *, rate: float, threshold: float) -> Tensor:
    return drop_by_attention(output, rate, threshold) if part.training else output
