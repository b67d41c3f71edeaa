"""The script that test_train runs under torchrun: three steps on quarters of batches, then a run of one epoch.

    python -m torch.distributed.run --nproc-per-node 2 two_processes.py RECIPE_JSON WEIGHTS

RECIPE_JSON is a file that holds a recipe; the first process writes the weights after the steps, and how often the
processes exchanged gradients, to WEIGHTS.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from models.processes import Process, join_processes, seed_everything
from models.training.objective import Batch, Learner, Targets, sample_pairs, training_step
from models.training.recipe import Recipe
from models.training.setup import build_model
from models.training.train import build_pair_loss, train


def weights_after_three_steps(recipe: Recipe, process: Process, batches: int) -> dict[str, torch.Tensor]:
    """Take three steps on this process's share of eight fixed images, in several batches each."""
    seed_everything(recipe.seed)
    model = build_model(recipe, ("blue", "green", "red")).train()
    model.patch_embed.eval()  # batch norm would see only part of a batch in each process, and rightly differ
    pair_loss = build_pair_loss(recipe, model, process)
    exchanges = torch.tensor(0)

    # torch requires exactly this annotation, which mypy does not find.
    def exchange(group: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        exchanges.add_(bucket.is_last())
        return allreduce_hook(group, bucket)  # type: ignore[arg-type] # None stands for all processes

    if isinstance(pair_loss, DistributedDataParallel):
        pair_loss.register_comm_hook(None, exchange)
    learner = Learner(pair_loss, torch.optim.SGD(model.parameters(), lr=0.5), torch.autocast("cpu", enabled=False))
    generator = torch.Generator().manual_seed(21)
    for step in range(3):
        images = torch.randn(8, 3, model.config.image_side, model.config.image_side, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        share = slice(process.rank, None, process.count)
        pairs = sample_pairs(model.config, recipe.seed, step)
        parts = zip(images[share].chunk(batches), labels[share].chunk(batches), strict=True)
        for number, (some, theirs) in enumerate(parts, start=1):
            training_step(learner, Batch(some, Targets(theirs), pairs, number=number, count=batches))
    return model.state_dict() | ({"exchanges": exchanges} if process.count > 1 else {})


if __name__ == "__main__":
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    process = join_processes(recipe.device)
    weights = weights_after_three_steps(recipe, process, batches=2)
    if process.is_first:
        torch.save(weights, sys.argv[2])
    train(recipe)
