"""The backbones in timm's registry: after this module is imported, `timm.create_model` builds them by name.

Serving needs no timm, whose import takes as long as PyTorch's, so `models.supervit` does not import this module.
"""

from dataclasses import replace
from typing import Any

from timm.models import register_model

from models.subnetwork import SuperViTConfig
from models.supervit import DEIT_MICRO, DEIT_SMALL, LVVIT_MICRO, LVVIT_SMALL, SuperViT


def _build(config: SuperViTConfig, pretrained: bool, options: dict[str, Any]) -> SuperViT:
    if pretrained:
        raise ValueError("no pretrained weights are available; use models.checkpoint.load_checkpoint(path)")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # create_model passes them to every model
        options.pop(name, None)
    drop_path_rate = options.pop("drop_path_rate", 0.0)
    return SuperViT(replace(config, **options), drop_path_rate)


@register_model  # type: ignore[untyped-decorator] # timm's
def supervit_deit_small_patch16_224(pretrained: bool = False, **options: Any) -> SuperViT:  # noqa: ANN401 - timm's signature
    """Build the published DeiT-S backbone; `options` are fields of SuperViTConfig and `drop_path_rate`."""
    return _build(DEIT_SMALL, pretrained, options)


@register_model  # type: ignore[untyped-decorator] # timm's
def supervit_lvvit_small_patch16_224(pretrained: bool = False, **options: Any) -> SuperViT:  # noqa: ANN401 - timm's signature
    """Build the published LV-ViT-S backbone; `options` are fields of SuperViTConfig and `drop_path_rate`."""
    return _build(LVVIT_SMALL, pretrained, options)


@register_model  # type: ignore[untyped-decorator] # timm's
def supervit_deit_micro_patch4_32(pretrained: bool = False, **options: Any) -> SuperViT:  # noqa: ANN401 - timm's signature
    """Build a DeiT for 32 px images; `options` are fields of SuperViTConfig and `drop_path_rate`."""
    return _build(DEIT_MICRO, pretrained, options)


@register_model  # type: ignore[untyped-decorator] # timm's
def supervit_lvvit_micro_patch4_32(pretrained: bool = False, **options: Any) -> SuperViT:  # noqa: ANN401 - timm's signature
    """Build the small default for 32 px images; `options` are fields of SuperViTConfig and `drop_path_rate`."""
    return _build(LVVIT_MICRO, pretrained, options)
