"""`supervit convert`: makes a SuperViT of a plain ViT, and prints its normalisation and the next step."""

from models.conversion.convert import convert as convert_vit
from models.conversion.options import Convert
from models.files.sources import HUB_PREFIX
from models.profiles import ProfileTable


def convert(command: Convert) -> None:
    """Convert the model, and print its sub-networks, its normalisation and the next step.

    Raises:
        CheckpointError: the file holds no plain ViT.
        OSError: the output cannot be written.
    """
    config = convert_vit(command)
    profile = ProfileTable.unmeasured(config)
    is_timm_name = not command.vit.exists() and not str(command.vit).startswith(HUB_PREFIX)
    told = command.mean or command.name or is_timm_name
    print(
        f"{command.output}: {len(profile.rows)} sub-networks of {profile.cheapest.gflops:.3g} to "
        f"{profile.rows[-1].gflops:.3g} GFLOPs, for images normalised with mean {config.mean} and std {config.std}"
        + ("" if told else " (ImageNet's unless the file has its own; set them with --name, or --mean and --std)")
    )
    if config.num_classes == 1:
        print(f"the model has no head; train one with `supervit train DATA --init {command.output}`")
    else:
        print(f"measure it with `supervit evaluate {command.output} DATA`")
