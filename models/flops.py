"""Multiply-accumulates of a sub-network, by arithmetic alone.

Every convolution and linear layer and the two matrix products of attention are counted, each for the tokens that it
sees. Norms, softmax, activations, resizing and the choice of tokens are left out, as in the literature. One
multiply-accumulate counts as one; the literature calls 1e9 of them a "GFLOP", and so do we.
"""

from models.subnetwork import SubNetwork, SuperViTConfig


def count_macs(config: SuperViTConfig, subnetwork: SubNetwork) -> int:
    """Count the multiply-accumulates of one image through `subnetwork`."""
    blocks = sum(
        _attention_macs(config, attention_tokens) + _mlp_macs(config, mlp_tokens)
        for attention_tokens, mlp_tokens in config.tokens_per_block(subnetwork)
    )
    return _embedding_macs(config, subnetwork.patch_grid) + blocks + _head_macs(config, subnetwork)


def _embedding_macs(config: SuperViTConfig, grid: int) -> int:
    kernel, patches = config.patch_kernel, grid**2
    if config.flavour == "deit":
        return patches * kernel**2 * 3 * config.width
    stem_pixels = patches * (kernel // 2) ** 2
    convolutions = 7**2 * 3 * config.stem_width + 2 * 3**2 * config.stem_width**2
    return stem_pixels * (convolutions + config.stem_width * config.width)


def _attention_macs(config: SuperViTConfig, tokens: int) -> int:
    projections = 4 * tokens * config.width**2
    matrix_products = 2 * tokens**2 * config.width
    return projections + matrix_products


def _mlp_macs(config: SuperViTConfig, tokens: int) -> int:
    return 2 * tokens * config.width * config.mlp_width


def _head_macs(config: SuperViTConfig, subnetwork: SubNetwork) -> int:
    if config.flavour == "deit":
        return config.head_width * config.num_classes
    final_tokens = config.tokens_per_block(subnetwork)[-1][1]  # the head reads the class token, aux_head the others
    return final_tokens * config.width * config.num_classes
