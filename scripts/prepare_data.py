#!/usr/bin/env python
"""Get data sets, convert each once, and say what is there: `python scripts/prepare_data.py dataset=cifar10,cifar100`.

Training does the same when it needs to; before many runs at once, or on a machine whose jobs have no network,
do it here first. Arguments are those of train.py, so that its own command can be given as it is, -m or not:
`study=accuracy` prepares the three sets of that study. `dataset.root=` says where the files lie.
"""

import argparse
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from abn_exp.commandline import HYDRA_ERRORS, check_groups, overrides_last, print_error
from abn_exp.config import DatasetConfig, read_dataset
from abn_exp.training.sweep import jobs

CONF = Path(__file__).resolve().parents[1] / "conf"


def main() -> int:
    """Prepare each data set that the command names; return 1 where one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("-m", "--multirun", action="store_true", help="as for train.py; several sets need it not")
    parser.add_argument("-cd", "--config-dir", type=Path, help="as for train.py: a folder with files of your own")
    arguments = parser.parse_args(overrides_last(sys.argv[1:]))
    try:
        check_groups(arguments.overrides, CONF)
        datasets = find_datasets(arguments.overrides, arguments.config_dir)
    except (*HYDRA_ERRORS, ValueError) as error:
        return print_error(error, CONF)
    code = 0
    for number, dataset in enumerate(datasets):
        try:
            text = describe(dataset)
        except (ValueError, OSError) as error:
            code = print_error(error)
        else:
            print("\n" * (number > 0) + text, flush=True)
    return code


def find_datasets(overrides: list[str], config_dir: Path | None) -> list[DatasetConfig]:
    """Return the data set of each run that train.py would make of these arguments, each set once."""
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir={config_dir} is not a folder")
    theirs = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", [*theirs, *overrides], run_mode=RunMode.MULTIRUN, from_shell=False)
        found: dict[tuple[str, ...], DatasetConfig] = {}
        for words in jobs(config):
            key = tuple(sorted(word for word in words if word.lstrip("+~").startswith("dataset")))
            if key not in found:
                found[key] = read_dataset(compose("config", [*theirs, *words]))
    return list({repr(dataset): dataset for dataset in found.values()}.values())


def describe(options: DatasetConfig) -> str:
    """Prepare and load a data set; return what it holds, and where."""
    from abn_exp.data.prepare import channel_statistics, load, prepare
    from abn_exp.data.readers import file_digest

    file, data = prepare(**options.source), load(**options.source)
    mean, std = channel_statistics(data.train.images)
    size = data.train.images.shape[-1]
    lines = [
        f"name      {data.name}",
        f"images    {len(data.train.labels)} train, {len(data.test.labels)} test, 3 x {size} x {size}",
        f"classes   {len(data.classes)}: {', '.join(data.classes[:5])}{' ...' if len(data.classes) > 5 else ''}",
        f"mean      {' '.join(f'{value:.4f}' for value in mean)}",
        f"std       {' '.join(f'{value:.4f}' for value in std)}",
    ]
    if file is None:
        return "\n".join([*lines, "file      none: the set is part of a library"])
    size_mb, digest = file.stat().st_size / 1e6, file_digest(file, "sha256")
    return "\n".join([*lines, f"file      {file.resolve()}", f"size      {size_mb:.1f} MB", f"sha256    {digest}"])


if __name__ == "__main__":
    sys.exit(main())
