import torch

from models.flops import count_macs
from models.published import PUBLISHED, describe_published
from models.supervit import DEIT_SMALL, LVVIT_SMALL


def test_the_stem_weights_identify_the_backbone() -> None:
    deit, lvvit = describe_published({}), describe_published({"patch_embed.conv1.weight": torch.zeros(1)})
    assert (deit.name, deit.config) == ("supervit_deit_small_patch16_224", DEIT_SMALL)
    assert (lvvit.name, lvvit.config) == ("supervit_lvvit_small_patch16_224", LVVIT_SMALL)


def test_every_published_subnetwork_has_its_macs_and_its_published_accuracy() -> None:
    for name, config, percents in PUBLISHED.values():
        weights = {"patch_embed.conv1.weight": torch.zeros(1)} if config.flavour == "lvvit" else {}
        header = describe_published(weights)
        assert header.name == name
        assert len(header.class_names) == 1000
        assert len(header.profile.rows) == len(percents) == 12
        assert header.profile.by_subnetwork[config.largest].top1 == round(max(percents) / 100, 4)
        assert all(row.macs == count_macs(config, row.subnetwork) for row in header.profile.rows)


def test_other_classes_get_numbered_names_and_no_accuracies() -> None:
    header = describe_published({"head.weight": torch.zeros(3, 384)})
    assert header.config.num_classes == 3
    assert header.class_names == ("class 0", "class 1", "class 2")
    assert not header.profile.is_measured
