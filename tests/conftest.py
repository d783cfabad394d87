"""What several test files share: composing a configuration as the command line would, on a small machine."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

os.environ.update(WANDB_MODE="disabled", WANDB_SILENT="true")
torch.set_num_threads(1)
# A script's background jobs ignore SIGINT, and so would the processes to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from abn_exp.identity import RunPlan, plan_run  # noqa: E402  (the environment must be set before)
from tests.helpers.runs import REPOSITORY, TINY  # noqa: E402


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., RunPlan]:
    """Return a function from overrides to a plan whose results go to the test's own folder."""

    def make(*overrides: str, tiny: bool = True) -> RunPlan:
        with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
            base = [f"results_dir={tmp_path}/results", *(TINY if tiny else []), *overrides]
            cfg = compose("config", base, return_hydra_config=True)
            return plan_run(cfg, dict(cfg.hydra.runtime.choices))

    return make
