"""Where each data set comes from: its archive, how that is read, and how many images it should have.

All else that is known of a data set (classes, size, channel statistics, crops and flips) stands in
``conf/dataset/<name>.yaml``. A new one is an entry here and a file there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from abn_exp.data import readers


@dataclass(frozen=True)
class DatasetInfo:
    """The source of one data set.

    ``read`` returns its arrays from the path of its archive. ``archive`` is the original's file name, "" for a set
    that is part of a library; ``md5`` is its digest ("": not checked). With ``parts``, an archive that
    holds a part of the set is accepted: it may have a longer name and another digest; a warning says so.
    """

    train_count: int
    test_count: int
    read: Callable[[Path], readers.Arrays]
    archive: str = ""
    url: str = ""
    md5: str = ""
    parts: bool = False


CATALOG = {
    # scikit-learn's load_digits, enlarged from 8 x 8: Alpaydin and Kaynak (1998), UCI
    "digits": DatasetInfo(train_count=1438, test_count=359, read=readers.read_digits),
    # Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images
    "cifar10": DatasetInfo(
        train_count=50_000,
        test_count=10_000,
        read=partial(readers.read_cifar, layout=readers.CIFAR10),
        archive="cifar-10-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
    ),
    # Krizhevsky (2009); labels are the 100 fine ones
    "cifar100": DatasetInfo(
        train_count=50_000,
        test_count=10_000,
        read=partial(readers.read_cifar, layout=readers.CIFAR100),
        archive="cifar-100-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
    ),
    # Stanford CS231n; its labelled validation images are the test set
    "tinyimagenet": DatasetInfo(
        train_count=100_000,
        test_count=10_000,
        read=readers.read_tinyimagenet,
        archive="tiny-imagenet-200.zip",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        parts=True,
    ),
}
