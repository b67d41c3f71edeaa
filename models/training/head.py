"""A linear head for new classes, fitted on the features of weights that do not change."""

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from models.data.images import normalise
from models.data.loaders import SampleLoader
from models.devices import autocast
from models.processes import is_first
from models.supervit import SuperViT

# Strength of the L2 regularisation, on features of unit variance.
L2_STRENGTH = 1e-3
ITERATIONS = 200
MIN_RELATIVE_STD = 1e-4  # of the median standard deviation; a feature below it is ignored as constant


@torch.no_grad()
def compute_features(model: SuperViT, batches: SampleLoader) -> tuple[list[Tensor], list[Tensor]]:
    """Run the largest sub-network, as in serving, over labelled images.

    Args:
        model: the model, on the device where it runs.
        batches: (B, 3, S, S) uint8 images with their (B,) labels.

    Returns:
        For each batch, (B, head width) features and (B,) labels, on the CPU.
    """
    was_training, device = model.training, model.cls_token.device
    model.eval()
    features, labels = [], []
    for images, its_labels in tqdm(batches, "features for the head", disable=not is_first(), mininterval=1):
        normalised = normalise(images.to(device), model.config)
        with autocast(device):
            features.append(model.features(normalised, model.config.largest).float().cpu())
        labels.append(its_labels)
    model.train(was_training)
    return features, labels


def fit_head(model: SuperViT, features: Tensor, labels: Tensor) -> None:
    """Fit the linear head of `model` that predicts `labels` from `features`: multinomial logistic regression.

    Features are standardised while fitting, so that one strength of regularisation suits all networks; the result
    is folded into the head's weights.

    Args:
        model: the model whose head gets new weights; an auxiliary head is set to zero.
        features: (M, head width).
        labels: (M,) class indices.
    """
    mean, std = features.mean(dim=0), features.std(dim=0)
    std[std < MIN_RELATIVE_STD * std.median()] = (
        torch.inf
    )  # a feature that was constant here must not change answers later
    standard = (features - mean) / std
    num_classes = model.config.num_classes
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = functional.cross_entropy(functional.linear(standard, weight, bias), labels)
        total: Tensor = error + L2_STRENGTH * weight.square().sum() / 2
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.head.weight.copy_(weight / std)
        model.head.bias.copy_(bias - (weight / std) @ mean)
        if model.aux_head is not None:  # untrained, it would add noise to the fitted logits
            model.aux_head.weight.zero_()
            model.aux_head.bias.zero_()
