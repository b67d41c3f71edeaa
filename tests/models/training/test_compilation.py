from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import _dynamo as dynamo
from torch import _inductor as inductor
from torch import nn

from models.training.compilation import compile_in_place
from models.training.recipe import Recipe
from models.training.state import TrainingError
from models.training.train import train
from tests.models.training.test_train import log_of

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The compiled graphs, from a backend that leaves each graph unchanged, because torch's own takes a minute."""
    compiled: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        del inputs
        compiled.append(graph)
        return graph.forward

    before = torch.compiler.get_default_backend()
    torch.compiler.reset()
    torch.compiler.set_default_backend(keep)
    yield compiled
    torch.compiler.set_default_backend(before)
    torch.compiler.reset()


def test_a_compiled_run_compiles_once_per_kind_of_step_and_learns_the_same(
    tmp_path: Path, tiny_recipe: MakeRecipe, graphs: list[torch.fx.GraphModule]
) -> None:
    options = {"epochs": 2, "depth": 2, "prune_blocks": (1,), "keep_rates": (0.5, 1.0), "patch_grids": (3, 4)}
    train(tiny_recipe(tmp_path / "as it is", **options))
    assert not graphs
    train(tiny_recipe(tmp_path / "compiled", compile=True, **options))
    assert len(graphs) == 3  # the check that there is a compiler, and a pair of each grid
    logs = [log_of(tmp_path / name) for name in ("as it is", "compiled")]
    for plain, compiled in zip(*logs, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-4)


def test_boxes_of_exchanged_tokens_are_no_kinds_of_step(
    tmp_path: Path, tiny_recipe: MakeRecipe, graphs: list[torch.fx.GraphModule]
) -> None:
    options = {"depth": 2, "prune_blocks": (1,), "keep_rates": (1.0,), "patch_grids": (4,), "mix_token": True}
    recipe = tiny_recipe(tmp_path / "run", model="supervit_lvvit_micro_patch4_32", compile=True, epochs=2, **options)
    train(recipe)
    assert len(graphs) == 2  # the check that there is a compiler, and the only pair


def test_more_combinations_of_arguments_than_the_default_limit_of_torch_are_compiled(
    graphs: list[torch.fx.GraphModule],
) -> None:
    class Power(nn.Module):
        def forward(self, x: torch.Tensor, exponent: int) -> torch.Tensor:
            return x**exponent

    with dynamo.config.patch(recompile_limit=8):  # torch's default, which some libraries change
        power = Power()
        compile_in_place(power, torch.device("cpu"))
        graphs.clear()
        for exponent in range(2, 22):
            assert torch.equal(power(torch.full((2,), 2.0), exponent), torch.full((2,), 2.0**exponent))
    assert len(graphs) == 20


def test_compiling_without_a_compiler_is_a_one_line_error(tmp_path: Path, tiny_recipe: MakeRecipe) -> None:
    torch.compiler.reset()
    with (
        inductor.config.patch({"cpp.cxx": (None, "/no/compiler"), "fx_graph_cache": False}),
        pytest.raises(TrainingError) as caught,
    ):
        train(tiny_recipe(tmp_path / "run", compile=True))
    torch.compiler.reset()
    assert str(caught.value).startswith("--compile needs a compiler for cpu: ")
    assert "no/compiler" in str(caught.value)
    assert "\n" not in str(caught.value)
