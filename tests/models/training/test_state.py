import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3

from models.evaluation.plots import plot_training
from models.supervit import SuperViT
from models.training.recipe import LARGE_DATASET_IMAGES, Recipe
from models.training.state import State, TrainingError, has_state, prepare_folder, read_log
from tests.models.conftest import CLASS_NAMES
from tests.models.training.test_recipe import data_of_size

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def state(deit: SuperViT) -> State:
    """A state after one update, so that the optimizer has moments to save."""
    optimizer = torch.optim.AdamW(deit.parameters(), lr=1e-3)
    average = ModelEmaV3(deit)
    for parameter in deit.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return State(deit, average, optimizer, 1)


@pytest.fixture
def saved(tmp_path: Path, tiny_recipe: MakeRecipe, state: State) -> State:
    """The state, saved in tmp_path after 3 epochs of the tiny recipe."""
    state.save(tiny_recipe(tmp_path), CLASS_NAMES, {"epoch": 3, "loss": {"single grid": 1.5}}, "watched")
    return state


def test_a_saved_state_loads_unchanged(tmp_path: Path, tiny_recipe: MakeRecipe, saved: State) -> None:
    before = copy.deepcopy(saved.model.state_dict())
    with torch.no_grad():
        saved.model.head.bias.add_(1)
    assert has_state(tmp_path)
    assert saved.load(tiny_recipe(tmp_path), CLASS_NAMES) == ({"epoch": 3, "loss": {"single grid": 1.5}}, "watched")
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"num_heads": 4}, "--num-heads 2, not 4"),
        ({"depth": None}, "--depth 3, not unset"),
        ({"prune_blocks": (1,)}, "--prune-blocks 1,2, not 1"),
        ({"keep_rates": (0.6, 1)}, "--keep-rates unset, not 0.6,1.0"),
        ({"weight_decay": 0.1}, "--weight-decay 0.05, not 0.1"),
        ({"accumulate": 2}, "--accumulate 1, not 2"),
        ({"clip_grad": 0.5}, "--clip-grad unset, not 0.5"),
        ({"optimizer": "adamw"}, "--optimizer muon, not adamw"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"holdout": 0.5}, "--holdout 0.02, not 0.5"),
        ({"rand_augment": "rand-m9"}, '--rand-augment "", not rand-m9'),
        ({"batch_size": 4, "seed": 1, "num_heads": 4}, "--num-heads 2, not 4; --batch-size 8, not 4; --seed 0, not 1"),
    ],
)
def test_a_state_of_other_options_is_refused_with_every_difference_in_one_line(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State, options: dict[str, object], difference: str
) -> None:
    before = copy.deepcopy(saved.model.state_dict())
    with pytest.raises(TrainingError) as caught:
        saved.load(tiny_recipe(tmp_path, **options), CLASS_NAMES)
    assert str(caught.value) == f"{tmp_path}/state.pt: was made with {difference}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.model.state_dict().items())


def test_an_option_that_an_older_state_lacks_gets_the_default_of_the_model_of_the_run(
    tmp_path: Path, tiny_recipe: MakeRecipe, state: State
) -> None:
    """On a large data set, MixToken is on by default for an LV-ViT only."""
    recipe = tiny_recipe(tmp_path, data=data_of_size(tmp_path, LARGE_DATASET_IMAGES))
    assert Recipe(data=recipe.data, output=tmp_path).mix_token  # by default, with another model than this run's
    state.save(recipe, CLASS_NAMES, {"epoch": 1})
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    del content["recipe"]["mix_token"]
    torch.save(content, tmp_path / "state.pt")
    assert state.load(recipe, CLASS_NAMES) == ({"epoch": 1}, None)


def test_a_resumed_run_may_change_duration_learning_rate_precision_and_device(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State
) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "state.pt").rename(tmp_path / "moved" / "state.pt")
    other = tiny_recipe(
        tmp_path / "moved",
        resume=True,
        data=tmp_path,
        epochs=9,
        learning_rate=1e-5,
        warmup_epochs=0,
        precision="bfloat16",
        compile=True,
        workers=3,
        device="cuda",
    )
    assert saved.load(other, CLASS_NAMES)[0]["epoch"] == 3


def test_the_gradient_scale_of_float16_is_restored(tmp_path: Path, tiny_recipe: MakeRecipe, state: State) -> None:
    used = torch.amp.GradScaler("cpu", init_scale=512.0)
    used.scale(torch.zeros(1))
    recipe = tiny_recipe(tmp_path)
    replace(state, scaler=used).save(recipe, CLASS_NAMES, {"epoch": 1})
    fresh = torch.amp.GradScaler("cpu")
    replace(state, scaler=fresh).load(recipe, CLASS_NAMES)
    assert fresh.state_dict() == used.state_dict()
    state.load(recipe, CLASS_NAMES)  # another precision has no scale
    state.save(recipe, CLASS_NAMES, {"epoch": 2})
    replace(state, scaler=fresh).load(recipe, CLASS_NAMES)  # and back in float16, the present scale is kept
    assert fresh.get_scale() == 512


def test_a_state_from_before_records_were_saved_loads_with_only_its_epoch(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State
) -> None:
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    del content["record"], content["scaler"]
    torch.save(content, tmp_path / "state.pt")
    scaled = replace(saved, scaler=torch.amp.GradScaler("cpu"))
    assert scaled.load(tiny_recipe(tmp_path), CLASS_NAMES) == ({"epoch": 3}, "watched")


@pytest.mark.parametrize(
    ("class_names", "difference"),
    [
        (("blue", "lime", "rose"), "class folder green, not lime"),
        (("blue", "green"), "class folder red, not none"),
        (("blue", "green", "red", "white"), "class folder none, not white"),
    ],
)
def test_a_state_of_other_classes_is_refused(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State, class_names: tuple[str, ...], difference: str
) -> None:
    with pytest.raises(TrainingError, match=rf"state\.pt: was made with {difference}$"):
        saved.load(tiny_recipe(tmp_path), class_names)


def test_a_state_of_another_number_of_processes_is_refused(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State
) -> None:
    two = replace(saved, processes=2)
    with pytest.raises(TrainingError, match=r"state\.pt: was made with 1 torchrun processes, not 2$"):
        two.load(tiny_recipe(tmp_path), CLASS_NAMES)


@pytest.mark.parametrize("lost", ["recipe", "class_names", "epoch", "processes", "model", "optimizer"])
def test_a_state_that_lacks_a_part_is_refused_with_the_name_of_the_part(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State, lost: str
) -> None:
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    del content[lost]
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match=rf"state\.pt: damaged or from another version: '{lost}'"):
        saved.load(tiny_recipe(tmp_path), CLASS_NAMES)


@pytest.mark.filterwarnings("ignore:for .*no-op:UserWarning")  # torch's, about weights that the meta device cannot hold
def test_the_step_counts_of_the_optimizer_stay_on_the_cpu_if_the_model_is_elsewhere(
    tmp_path: Path, tiny_recipe: MakeRecipe, saved: State
) -> None:
    model = copy.deepcopy(saved.model).to("meta")
    elsewhere = State(model, saved.average, torch.optim.AdamW(model.parameters()), 1)
    elsewhere.load(tiny_recipe(tmp_path), CLASS_NAMES)
    for remembered in elsewhere.optimizer.state.values():
        assert (remembered["step"].device.type, remembered["exp_avg"].device.type) == ("cpu", "meta")


@pytest.mark.parametrize("kind", ["model", "average"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_with_one_nan_or_infinite_weight_is_not_finite(state: State, kind: str, value: float) -> None:
    assert state.is_finite
    model = state.model if kind == "model" else state.average.module
    model.head.bias.data[1] = value
    assert not state.is_finite


def test_prepare_folder_creates_an_empty_folder(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "deep" / "run")
    prepare_folder(tmp_path / "deep" / "run")
    assert not list((tmp_path / "deep" / "run").iterdir())


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the name must be UTF-8"):
        prepare_folder(tmp_path / "caf\udce9")


def record(epoch: int, watched: str = "grid 4 at keep rate 1", loss: str = "largest grid") -> dict[str, object]:
    return {"epoch": epoch, "loss": {loss: 1.0}, "top1": {watched: 0.5}}


def test_the_log_is_read_up_to_the_saved_epoch(tmp_path: Path) -> None:
    assert read_log(tmp_path, 2) == []
    lines = [json.dumps(record(epoch)) for epoch in (1, 2)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"epoch": 3, "loss": "of a state that was lost"}']))
    assert read_log(tmp_path, 2) == [record(1), record(2)]


def test_a_log_may_mix_single_epochs_with_epochs_of_pairs(tmp_path: Path) -> None:
    records = [record(1, loss="single grid"), record(2)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_log(tmp_path, 2) == records
    plot_training(records, tmp_path / "training.png")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"7\n",
        b"{}\n",
        b'{"epoch": "one"}\n',
        b'{"epoch": 1}\n',
        b'{"epoch": 1, "loss": 2, "top1": 3}\n',
        "\n".join(json.dumps(record(epoch, str(epoch))) for epoch in (1, 2)).encode(),
    ],
)
def test_a_log_that_cannot_be_plotted_is_refused_as_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(TrainingError, match=r"log\.jsonl: damaged: .*; repair it, or move it away"):
        read_log(tmp_path, 2)
