"""Train two steps of every network, narrow, in every precision, and say of each how it went.

Run as a process of its own (`python -m tests.helpers.two_steps`), so that a kernel that writes beyond its memory ends
this process and not the test's. What is about to be tried is printed before it is, so the last line names it.
"""

from itertools import product

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from abn_exp.config import Config, read
from abn_exp.errors import ConfigError
from abn_exp.models import resnet18_paper
from abn_exp.training.parallel import StepLoop, random_data
from benchmarks.conventional import Norm, conventional
from tests.helpers.runs import REPOSITORY

# The width at which the narrowest layer has 8 channels; at the other one, every layer has 2.
EIGHT_CHANNELS = {"binarynet": 0.0625, "vgg_small": 0.0625, "resnet18": 0.125, "resnet18_paper": 0.5}
NARROWEST = 0.001
PRECISIONS = ("fp32", "bf16", "exact16")
BATCH = 8


def combinations() -> list[str]:
    """Return what is tried, as it is printed, in its order."""
    ours = [
        f"{model} {width} {precision}"
        for model, eight in EIGHT_CHANNELS.items()
        for width, precision in product((NARROWEST, eight), PRECISIONS)
    ]
    return [*ours, "conventional"]


def two_steps(config: Config) -> str:
    """Return "trained", or the sentence in which the precision is refused."""
    try:
        loop = StepLoop(config, random_data(2 * BATCH, 10), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    batches = list(loop.loaders["train"])
    assert len(batches) == 2
    for batch in batches:
        loop.step(batch)
    assert all(parameter.isfinite().all() for parameter in loop.network.parameters())
    return "trained"


def two_conventional_steps() -> str:
    """The benchmark's conventional network, in the memory format in which it can be asked for."""
    network: nn.Module = conventional(resnet18_paper(10, 32, Norm, width=NARROWEST))
    network.to(memory_format=torch.channels_last)
    for _ in range(2):
        network(torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward(retain_graph=True)
    return "trained"


def main() -> None:
    torch.set_num_threads(1)
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        options = [f"recipe.batch_size={BATCH}", "recipe.val_fraction=0", "dataset.padding=0", "device=cpu"]
        base = {model: read(compose("config", [f"model={model}", *options])) for model in EIGHT_CHANNELS}
    for name in combinations():
        print(name, end=": ", flush=True)
        if name == "conventional":
            print(two_conventional_steps(), flush=True)
            continue
        model, width, precision = name.split()
        config = base[model]
        update = {"model": {**config.model, "width": float(width)}, "precision": precision}
        print(two_steps(config.model_copy(update=update)), flush=True)


if __name__ == "__main__":
    main()
