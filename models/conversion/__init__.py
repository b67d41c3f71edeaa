"""From any plain vision transformer to a SuperViT, without training."""
