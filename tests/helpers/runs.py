"""A run of a few seconds, and where the repository is."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# A run of a few seconds: 200 of the embedded images, a network of 8 channels.
TINY = ["dataset.train_images=200", "model.width=0.0625", "recipe.epochs=2", "recipe.batch_size=32"]
