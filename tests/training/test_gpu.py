"""What a GPU is needed for: `pytest -m gpu`, which scripts/on_gpu.sh runs. Everything else is tested on the CPU."""

from collections.abc import Callable

import pytest
import torch

from abn_exp.identity import RunPlan
from abn_exp.training.parallel import measure, random_data
from abn_exp.training.run import run
from abn_exp.training.setup import select_device
from benchmarks.configurations import configuration
from benchmarks.ours import OurLoop
from tests.helpers.faults import differences
from tests.training.test_run import interrupt_after

Make = Callable[..., RunPlan]
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler and of Lightning's trainer
]


@pytest.mark.parametrize("model", ["binarynet", "vgg_small", "resnet18", "resnet18_paper"])
@pytest.mark.parametrize("norm", ["bn", "abn"])
def test_a_run_is_repeated_and_resumed_bit_for_bit(make_plan: Make, model: str, norm: str) -> None:
    options = [f"device={DEVICE}", f"model={model}", f"norm={norm}"]
    first, again, resumed = (make_plan(f"name={name}", *options) for name in ("first", "again", "resumed"))
    assert run(first, "python train.py").device_kind == (torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")
    run(again, "python train.py")
    interrupt_after(resumed, epochs=1)
    run(resumed, "python train.py")
    assert differences(again.directory, first.directory) == []
    assert differences(resumed.directory, first.directory) == []


@pytest.mark.parametrize("precision", ["bf16", "exact16"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_every_precision_trains(make_plan: Make, precision: str, compiled: str) -> None:
    plan = make_plan(f"device={DEVICE}", f"precision={precision}", f"compile={compiled}")
    assert run(plan, "python train.py").epochs == 2


def test_the_benchmarked_loop_goes_on_after_each_of_its_parts() -> None:
    config = configuration("binarynet", 0.0625, 32, (f"device={DEVICE}",))
    loop = OurLoop(config, random_data(640, 100), select_device(config))
    batch = next(iter(loop.loaders["train"]))
    for part in (lambda: loop.train(1, 2), loop.evaluate, loop.epoch):
        assert part() > 0
        loop.step(batch)


def test_processes_share_it(make_plan: Make) -> None:
    config = make_plan(f"device={DEVICE}").config
    rates = measure(config, "abn", [1, 2], select_device(config), 0.5)
    assert rates[1] > 0 < rates[2]
