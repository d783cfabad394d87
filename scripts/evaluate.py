#!/usr/bin/env python
"""Evaluate a run's saved weights on any data set.

    python scripts/evaluate.py RUN dataset=folder dataset.path=$HOME/images

RUN is a run's folder (.../seed-0). The data set is chosen as for train.py, by default the run's own; it needs images
of the same size and as many classes. What the network predicts for each image is written beside the run's
checkpoints, as evaluation/<dataset>-<part>-<weights>.csv; of a folder with its name and a digest of its path. All is
in float32: of a run that was tested on a GPU, with TF32 convolutions, a few predictions may differ from its record.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from abn_exp.analysis.evaluate import evaluate
from abn_exp.commandline import HYDRA_ERRORS, check_groups, print_error
from abn_exp.config import DatasetConfig, read_dataset
from abn_exp.errors import ConfigError
from abn_exp.training.setup import cuda_works

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # norms of one's own lie beside train.py


def chosen_dataset(words: list[str]) -> DatasetConfig | None:
    """Return the data set that the words choose, None where there are none. Raises ConfigError for any other word."""
    if wrong := [word for word in words if not word.lstrip("+").startswith(("dataset=", "dataset."))]:
        raise ConfigError(f"{wrong[0]} is not allowed: only dataset=... and dataset.KEY=... are chosen here.")
    if words and not any(word.startswith("dataset=") for word in words):
        raise ConfigError(f"{words[0]} is not enough: choose the data set as well, e.g. dataset=cifar10.")
    check_groups(words, REPOSITORY / "conf")
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        return read_dataset(compose("config", words)) if words else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("dataset", nargs="*", metavar="dataset=...", help="as for train.py (default: the run's own)")
    parser.add_argument("--weights", choices=["last", "best"], default="last", help="of which epoch (default: last)")
    parser.add_argument("--part", choices=["train", "test"], default="test", help="which images (default: test)")
    parser.add_argument("--out", type=Path, help="where to write (default: evaluation/ in the run's folder)")
    arguments = parser.parse_args()
    device = "cuda" if cuda_works() else "cpu"
    try:
        dataset = chosen_dataset(arguments.dataset)
        found = evaluate(arguments.run, dataset, arguments.weights, arguments.part, device)
        name = "own" if dataset is None else dataset.name
        if dataset is not None and dataset.path is not None:
            folder = Path(dataset.path).resolve()  # of which another may have the same name
            name += f"-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        path = arguments.out
        if path is None:
            path = arguments.run / "evaluation" / f"{name}-{arguments.part}-{arguments.weights}.csv"
        found.write(path)
    except (*HYDRA_ERRORS, ValueError, OSError) as error:
        return print_error(error, REPOSITORY / "conf")
    print(f"{len(found.labels):,} images: accuracy {100 * found.accuracy:.2f} %, cross-entropy {found.loss:.4f}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
