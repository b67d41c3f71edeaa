"""What test_train runs under torchrun: three steps on halves of batches, and then a run of one epoch.

    python -m torch.distributed.run --nproc-per-node 2 two_processes.py RECIPE_JSON WEIGHTS

RECIPE_JSON is a file that holds a recipe; the first process writes the weights after the steps to WEIGHTS.
"""

import sys
from pathlib import Path

import torch

from models.objective import Targets, sample_pairs, training_step
from models.recipe import Recipe
from models.train import Process, build_model, build_pair_loss, join_processes, seed_everything, train


def weights_after_three_steps(recipe: Recipe, process: Process) -> dict[str, torch.Tensor]:
    """Take three steps on this process's share of fixed batches of eight."""
    seed_everything(recipe.seed)
    model = build_model(recipe, 3).train()
    model.patch_embed.eval()  # batch norm would see half a batch in each process, and be right to answer otherwise
    pair_loss = build_pair_loss(recipe, model, process)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(21)
    for step in range(3):
        images = torch.randn(8, 3, model.config.image_side, model.config.image_side, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        share = slice(process.rank, None, process.count)
        pairs = sample_pairs(model.config, recipe.seed, step)
        exact = torch.autocast("cpu", enabled=False)
        training_step(pair_loss, optimizer, images[share], Targets(labels[share]), pairs, exact)
    return model.state_dict()


if __name__ == "__main__":
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    process = join_processes(recipe.device)
    weights = weights_after_three_steps(recipe, process)
    if process.is_first:
        torch.save(weights, sys.argv[2])
    train(recipe)
