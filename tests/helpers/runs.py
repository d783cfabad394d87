"""A run of a few seconds, its plan, and where the repository is."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from abn_exp.identity import RunPlan, plan_run

REPOSITORY = Path(__file__).parents[2]

# A run of a few seconds: 200 of the embedded images, a network of 8 channels.
TINY = ["dataset.train_images=200", "model.width=0.0625", "recipe.epochs=2", "recipe.batch_size=32"]


def plan_in(folder: Path, *overrides: str, tiny: bool = True) -> RunPlan:
    """Compose a configuration as the command line would; its results go to `folder`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        words = [f"results_dir={folder}", *(TINY if tiny else []), *overrides]
        cfg = compose("config", words, return_hydra_config=True)
        return plan_run(cfg, dict(cfg.hydra.runtime.choices))
