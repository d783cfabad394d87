#!/usr/bin/env python
"""Get a data set, convert it once, and say what is there: `python scripts/prepare_data.py dataset=cifar100`.

Training does the same when it needs to; before many runs at once, or on a machine whose jobs have no network,
do it here first. `dataset.root=` says where the files lie.
"""

import sys
from typing import Any

import hydra
from omegaconf import DictConfig

from abn_exp.config import read
from abn_exp.data.prepare import channel_statistics, load, prepare
from abn_exp.data.readers import file_digest


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Prepare and load the data set of the configuration, and describe it on stdout."""
    try:
        options = read(cfg).dataset
        source: dict[str, Any] = {
            "path": options.path,
            "image_size": options.image_size,
            "download": options.download,
        }
        file = prepare(options.name, options.root, **source)
        data = load(options.name, options.root, **source)
        digest = None if file is None else file_digest(file, "sha256")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    mean, std = channel_statistics(data.train.images)
    size = data.train.images.shape[-1]
    print(f"name      {data.name}")
    print(f"images    {len(data.train.labels)} train, {len(data.test.labels)} test, 3 x {size} x {size}")
    print(f"classes   {len(data.classes)}: {', '.join(data.classes[:5])}{' ...' if len(data.classes) > 5 else ''}")
    print(f"mean      {' '.join(f'{value:.4f}' for value in mean)}")
    print(f"std       {' '.join(f'{value:.4f}' for value in std)}")
    if file is None:
        print("file      none: the set is part of scikit-learn")
    else:
        print(f"file      {file.resolve()}")
        print(f"size      {file.stat().st_size / 1e6:.1f} MB")
        print(f"sha256    {digest}")


if __name__ == "__main__":
    main()
