from pathlib import Path

import pytest
import torch

from models.data.datasets import open_folder
from models.data.images import evaluation_transform, normalise
from models.data.loaders import SampleLoader
from models.supervit import SuperViT
from models.training.head import compute_features, fit_head


def test_the_fitted_head_separates_classes_that_the_features_separate(deit: SuperViT) -> None:
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    centres = torch.randn(3, 16)
    features = 5 + 0.01 * (centres[labels] + 0.2 * torch.randn(90, 16))  # far from zero mean and unit variance
    fit_head(deit, features, labels)
    with torch.inference_mode():
        assert torch.equal(deit.head(features).argmax(dim=1), labels)


def test_the_fitted_head_is_the_optimum_of_the_logistic_regression(deit: SuperViT) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 16, dtype=torch.float32), torch.randint(0, 3, (60,))
    fit_head(deit, features, labels)
    std = features.std(dim=0)
    weight = (deit.head.weight.detach() * std).requires_grad_()
    bias = deit.head.bias.detach().clone().requires_grad_()
    logits = torch.nn.functional.linear(features / std, weight, bias)
    (torch.nn.functional.cross_entropy(logits, labels) + 1e-3 * weight.square().sum() / 2).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad is not None
    assert bias.grad.abs().max() < 1e-4


@pytest.mark.usefixtures("in_float32")
def test_features_are_the_inputs_of_the_head_of_the_largest_subnetwork(deit: SuperViT, pictures: Path) -> None:
    images = open_folder(pictures / "val", evaluation_transform(deit.config))
    deit.train()
    features, labels = compute_features(deit, SampleLoader(images, 5))
    assert deit.training
    assert torch.cat(labels).tolist() == [label for _, label in images.files]
    with torch.inference_mode():
        expected = deit.eval()(normalise(torch.stack([images[index][0] for index in range(len(images))]), deit.config))
        torch.testing.assert_close(deit.head(torch.cat(features)), expected)
