import pytest
import torch

from models.checkpoint import Checkpoint
from models.data import normalise
from models.devices import DeviceError
from service.engine import TorchEngine


def test_the_engine_normalises_and_answers_what_the_model_answers(checkpoint: Checkpoint) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    engine = TorchEngine(checkpoint.model, "cpu")
    for subnetwork in checkpoint.config.subnetworks:
        with torch.inference_mode():
            expected = checkpoint.model(normalise(images, checkpoint.config), subnetwork)
        assert torch.equal(engine.run(images, subnetwork), expected)


def test_warming_up_runs_every_trained_sub_network(checkpoint: Checkpoint) -> None:
    seen = []
    checkpoint.model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    TorchEngine(checkpoint.model, "cpu").warm_up()
    assert set(seen) == set(checkpoint.config.subnetworks)


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_line(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' cannot be used: [^\\n]+$"):
        TorchEngine(checkpoint.model, device)


def test_the_engine_describes_itself(checkpoint: Checkpoint) -> None:
    assert "cpu" in TorchEngine(checkpoint.model, "auto" if not torch.cuda.is_available() else "cpu").describe()
