"""The checkpoints that the authors of SuperViT published: their names, architectures and accuracies."""

from dataclasses import replace

from torch import Tensor

from models.flops import count_macs
from models.header import Header
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SuperViTConfig
from models.supervit import DEIT_SMALL, LVVIT_SMALL

# ImageNet top-1 in percent by grid and then keep rate (paper, table 1); the largest sub-network comes last.
PUBLISHED = {
    "deit": (
        "supervit_deit_small_patch16_224",
        DEIT_SMALL,
        (73.75, 75.28, 75.79, 77.32, 78.31, 78.53, 78.91, 79.62, 79.87, 79.95, 80.50, 80.62),
    ),
    "lvvit": (
        "supervit_lvvit_small_patch16_224",
        LVVIT_SMALL,
        (76.64, 79.82, 80.71, 79.81, 81.73, 82.24, 81.12, 82.59, 82.94, 82.11, 83.15, 83.47),
    ),
}


def describe_published(weights: dict[str, Tensor]) -> Header:
    """Describe a published checkpoint; one fine-tuned to other classes keeps only name and architecture."""
    name, config, top1 = PUBLISHED["lvvit" if "patch_embed.conv1.weight" in weights else "deit"]
    head = weights.get("head.weight")
    if head is not None and head.ndim == 2 and head.shape[0] not in (0, config.num_classes):
        config = replace(config, num_classes=head.shape[0])
        class_names = tuple(f"class {index}" for index in range(config.num_classes))
        return Header(name, config, class_names, ProfileTable.unmeasured(config))
    from timm.data import ImageNetInfo  # its import takes seconds, and our own format does not need it

    rows = tuple(
        SubNetworkProfile(subnetwork, count_macs(config, subnetwork), top1=round(percent / 100, 4))
        for subnetwork, percent in zip(config.subnetworks, top1, strict=True)
    )
    return Header(name, config, tuple(ImageNetInfo().label_descriptions()), ProfileTable(rows))


def class_indices(class_names: tuple[str, ...]) -> dict[str, int]:
    """Return the logit index of each class by its name and, for ImageNet, by its WordNet ID as well."""
    indices = {name: index for index, name in enumerate(class_names)}
    if len(class_names) == DEIT_SMALL.num_classes:
        from timm.data import ImageNetInfo  # as above

        imagenet = ImageNetInfo()
        if class_names == tuple(imagenet.label_descriptions()):
            indices |= {name: index for index, name in enumerate(imagenet.label_names())}
    return indices


def published_config(weights: dict[str, Tensor]) -> SuperViTConfig | None:
    """Return the architecture of a SuperViT's bare state dict; None for one that was never published."""
    config = describe_published(weights).config
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    width = weights["cls_token"].shape[-1] if "cls_token" in weights else 0
    return config if (depth, width) == (config.depth, config.width) else None


def is_plain_vit(weights: dict[str, Tensor]) -> bool:
    """Return whether weights are those of a plain ViT, named as timm, DeiT or transformers name them."""
    has_own = any(name.startswith("pos_embed_list.") for name in weights)
    is_timm = "pos_embed" in weights and any(name.startswith("blocks.") for name in weights)
    is_transformers = any(name.endswith("embeddings.position_embeddings") for name in weights) and any(
        "encoder.layer." in name for name in weights
    )
    return not has_own and (is_timm or is_transformers)
