"""The header of our own checkpoint format: values that describe the weights. `checkpoint` reads and writes it."""

from dataclasses import dataclass

from models.profiles import ProfileTable
from models.quantization import LAYERS, Quantization
from models.subnetwork import SuperViTConfig


@dataclass(frozen=True, slots=True)
class Header:
    """Description of a checkpoint's weights.

    Attributes:
        name: the model's name.
        config: the architecture, its family and its preprocessing.
        class_names: one per logit.
        profile: cost and, where known, accuracy of each sub-network.
        int8: what the model needs to run in 8 bits; None where the checkpoint is not quantised.

    Raises:
        ValueError: the values contradict one another.
    """

    name: str
    config: SuperViTConfig
    class_names: tuple[str, ...]
    profile: ProfileTable
    int8: Quantization | None = None

    def __post_init__(self) -> None:
        if len(self.class_names) != self.config.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.config.num_classes} classes")
        _check_profile(self.profile, self.config)
        if self.int8 is not None:
            _check_profile(self.int8.profile, self.config)
            if len(self.int8.ranges) != self.config.depth:
                raise ValueError(f"{len(self.int8.ranges)} blocks are quantised, but the model has {self.config.depth}")
            for block in self.int8.ranges:
                for layer in LAYERS:
                    width = self.config.mlp_width if layer == "fc2" else self.config.width
                    if len(getattr(block, layer).smoothing) not in (0, width):
                        raise ValueError(f"{layer} must smooth none or all of {width} channels")


def _check_profile(profile: ProfileTable, config: SuperViTConfig) -> None:
    missing = set(config.subnetworks) - profile.by_subnetwork.keys()
    if missing:
        raise ValueError(f"the profile has no row for {min(missing)}")
    strange = {row.subnetwork.patch_grid for row in profile.rows} - set(config.patch_grids)
    if strange:
        raise ValueError(f"the profile has grid {min(strange)}, which was not trained")
    for row in profile.rows:
        if row.is_trained != (row.subnetwork in config.subnetworks):
            raise ValueError(f"the profile has a wrong is_trained for {row.subnetwork}")
