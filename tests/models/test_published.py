import torch

from models.flops import count_macs
from models.published import PUBLISHED, describe_published
from models.supervit import DEIT_SMALL, LVVIT_SMALL


def test_the_stem_weights_identify_the_backbone() -> None:
    assert describe_published({})[:2] == ("supervit_deit_small_patch16_224", DEIT_SMALL)
    stem = {"patch_embed.conv1.weight": torch.zeros(1)}
    assert describe_published(stem)[:2] == ("supervit_lvvit_small_patch16_224", LVVIT_SMALL)


def test_every_published_subnetwork_has_its_macs_and_its_published_accuracy() -> None:
    for name, config, percents in PUBLISHED.values():
        weights = {"patch_embed.conv1.weight": torch.zeros(1)} if config.flavour == "lvvit" else {}
        described, _, class_names, profile = describe_published(weights)
        assert described == name
        assert len(class_names) == 1000
        assert len(profile.rows) == len(percents) == 12
        assert profile.by_subnetwork[config.largest].top1 == round(max(percents) / 100, 4)
        assert all(row.macs == count_macs(config, row.subnetwork) for row in profile.rows)


def test_other_classes_get_numbered_names_and_no_accuracies() -> None:
    _, config, class_names, profile = describe_published({"head.weight": torch.zeros(3, 384)})
    assert config.num_classes == 3
    assert class_names == ("class 0", "class 1", "class 2")
    assert not profile.is_measured
