"""Facts of each data set: its constants, and where its original comes from.

What a person varies (crops, flips, the number of training images) is in ``conf/dataset/<name>.yaml``.
"""

from dataclasses import dataclass

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of one data set.

    ``mean`` and ``std`` are those of the training pixels, scaled to [0, 1], a channel (red, green, blue) at
    a time. ``padding`` is how many black pixels the field's random crop adds to each side. ``archive`` is the
    original's file name and ``md5`` its digest (None: the publisher gives none). The embedded set has none.
    """

    name: str
    num_classes: int
    image_size: int
    train_count: int
    test_count: int
    mean: Channels
    std: Channels
    padding: int
    flip: bool
    archive: str = ""
    url: str = ""
    md5: str | None = None


CATALOG = {
    info.name: info
    for info in (
        DatasetInfo(
            name="digits",  # scikit-learn's load_digits, enlarged from 8 x 8: Alpaydin and Kaynak (1998), UCI
            num_classes=10,
            image_size=32,
            train_count=1438,
            test_count=359,
            mean=(0.3055, 0.3055, 0.3055),
            std=(0.3237, 0.3237, 0.3237),
            padding=2,
            flip=False,  # a mirrored digit is another digit, or none
        ),
        DatasetInfo(
            name="cifar10",  # Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images
            num_classes=10,
            image_size=32,
            train_count=50_000,
            test_count=10_000,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            padding=4,
            flip=True,
            archive="cifar-10-python.tar.gz",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
        ),
        DatasetInfo(
            name="cifar100",  # Krizhevsky (2009); labels are the 100 fine ones
            num_classes=100,
            image_size=32,
            train_count=50_000,
            test_count=10_000,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            padding=4,
            flip=True,
            archive="cifar-100-python.tar.gz",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
        ),
        DatasetInfo(
            name="tinyimagenet",  # Stanford CS231n; its labelled validation images are the test set
            num_classes=200,
            image_size=64,
            train_count=100_000,
            test_count=10_000,
            # Of 10,000 training images (50 a class), not of all 100,000.
            mean=(0.4825, 0.4504, 0.3997),
            std=(0.2766, 0.2690, 0.2818),
            padding=8,
            flip=True,
            archive="tiny-imagenet-200.zip",
            url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ),
    )
}
