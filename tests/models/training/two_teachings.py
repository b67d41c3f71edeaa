"""The script that test_batches runs under torchrun: a teacher is asked once about each image.

    python -m torch.distributed.run --nproc-per-node 2 two_teachings.py RECIPE_JSON FOUND

RECIPE_JSON is a file that holds a recipe; the processes write their results to FOUND.0 and FOUND.1.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from models.data.datasets import open_training_data
from models.data.images import evaluation_transform
from models.processes import joined_processes
from models.training.batches import soft_targets
from models.training.recipe import Recipe
from models.training.setup import build_model
from models.training.teacher import Teacher


class Counting(Teacher):
    """A teacher that counts the images that it is asked about."""

    num_asked = 0

    def classify_with_mirror(self, images: Tensor) -> Tensor:
        self.num_asked += len(images)
        return super().classify_with_mirror(images)


if __name__ == "__main__":
    recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with joined_processes(recipe.device) as process:
        config = build_model(recipe, ("blue", "green", "red")).config
        teacher = Counting.load(str(recipe.teacher), recipe.teacher_checkpoint, recipe.teacher_side, config)
        images, _ = open_training_data(recipe.data, config, evaluation_transform(config), recipe.holdout, recipe.seed)
        targets = soft_targets(recipe, config, teacher, images, process)
        torch.save({"targets": targets, "num_asked": teacher.num_asked}, f"{sys.argv[2]}.{process.rank}")
