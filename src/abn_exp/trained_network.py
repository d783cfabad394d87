"""The network of a run: the configuration that describes it, its weights, what it takes and what it predicts.

Each is a file of the run's folder (`results`) or, of a quoted study, of an archive. Weights are in checkpoints; of a
run that was packed with its network, they are in `network.ckpt`, too.
"""

import hashlib
import io
import json
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import yaml
from pydantic import TypeAdapter, ValidationError

from abn_exp.config import IMAGENET_MEAN, IMAGENET_STD
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.files import write_text_atomic, writing
from abn_exp.records import NETWORK, read_run_file

if TYPE_CHECKING:  # reading records needs no torch, which takes seconds to import; reading weights does
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there


class OfRun(Protocol):
    """A run or a result, which know their folder."""

    @property
    def directory(self) -> Path | None: ...


def directory_of(run: OfRun | str | Path) -> Path:
    """Return a run's directory, which may be that of one in a study's archive."""
    directory = Path(run) if isinstance(run, str | Path) else run.directory
    if directory is None:
        raise ValueError("This result was not read from a run's folder; give the folder.")
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run. Raises DamagedFile where it is not there or cannot be read."""
    path = directory / "config.yaml"
    try:
        if (content := read_run_file(directory, path.name)) is None:
            raise ValueError("it is gone")
        config = yaml.load(content.decode(), SafeLoader)
        if not isinstance(config, dict):
            raise ValueError("it is not a configuration")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DamagedFile(path, error) from error
    dataset = config.get("dataset")
    if isinstance(dataset, dict) and "images" not in dataset:
        dataset["images"] = _images_held(directory)
    return config


def write_config(directory: Path, config: dict[str, Any], command: str) -> None:
    """Write a run's resolved configuration, with the command above it, in one line."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomic(directory / "config.yaml", f"# {' '.join(command.split())}\n" + yaml.safe_dump(config))


def _images_held(directory: Path) -> list[int] | None:
    """Return how many training and test images a run's data set held, which older runs only printed: where fewer than
    the catalog says."""
    printed = (read_run_file(directory, "train.log") or b"").decode(errors="replace")
    found = re.search(r"has (\d+) \+ (\d+) images here; the full set has", printed)
    return [int(found[1]), int(found[2])] if found is not None else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU; nothing in it is executed.

    A checkpoint is a zip archive; its checksums find what loading does not notice, down to a single bit.
    Raises DamagedFile where it is not a whole checkpoint, OSError where it cannot be opened.
    """
    with open(path, "rb") as file:
        return _read_checkpoint(file, Path(path))


def _read_checkpoint(file: IO[bytes], path: Path) -> dict[str, Any]:
    import torch

    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which no checkpoint is")
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
        file.seek(0)
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError("it holds no weights")
    except Exception as error:  # decoding unknown bytes may raise anything
        raise DamagedFile(path, f"it is not a whole checkpoint of weights ({_brief(error)})") from error
    return checkpoint


def _brief(error: Exception) -> str:
    """Return the first sentence of an error."""
    return re.split(r"\. |\n", f"{error}" or type(error).__name__)[0]


def load_network(run: OfRun | str | Path, weights: Literal["last", "best"] = "last") -> "torch.nn.Module":
    """Return the network of a run with its trained weights, in evaluation mode on the CPU.

    ``weights`` are those of the last epoch or of the best validation epoch. Of a run that was packed with its network
    they are the last epoch's, the binary ones as their signs: it computes the same, bit for bit. Raises
    FileNotFoundError where the run has saved none, DamagedFile where they are not what was written or not those of
    this network, ConfigError where its configuration no longer describes a network.
    """
    from abn_exp.models.build import build_network

    directory = directory_of(run)
    config = read_config(directory)
    path, checkpoint = _read_weights(directory, weights)
    try:
        classes, image_size = checkpoint["num_classes"], config["dataset"]["image_size"]
        network = build_network(config["model"], config["norm"], classes, image_size)
        prefix = "network."
        network.load_state_dict({key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise DamagedFile(path, f"it does not fit the network in config.yaml ({_brief(error)})") from error
    return network.eval()


def weights_file(directory: Path, weights: Literal["last", "best"] = "last") -> Path:
    """Return where a run's weights are: in a checkpoint, or, for the last ones where that is not there, in
    `network.ckpt`, which may be in an archive. Where there are none, that of the checkpoint."""
    path = directory / "checkpoints" / f"{weights}.ckpt"
    if weights == "last" and not path.is_file() and read_run_file(directory, NETWORK) is not None:
        return directory / NETWORK
    return path


def _read_weights(directory: Path, weights: Literal["last", "best"]) -> tuple[Path, dict[str, Any]]:
    path = weights_file(directory, weights)
    packed = read_run_file(directory, NETWORK) if path.name == NETWORK else None
    return path, read_checkpoint(path) if packed is None else _read_checkpoint(io.BytesIO(packed), path)


def pack_network(run: OfRun | str | Path) -> bytes:
    """Return `network.ckpt` of a run: its last weights, the binary ones as their signs in int8 and the others as they
    are. Compressed, a sign takes little more than a bit. Errors as in `load_network`.

    Where a network of one's own computes anything else with these, since a layer uses the size of its latent weights,
    too, all weights are kept as they are.
    """
    import torch

    from abn_exp.binarize import BinaryConv2d, BinaryLinear

    _, checkpoint = _read_weights(directory_of(run), "last")
    state, network = dict(checkpoint["state_dict"]), load_network(run)
    for name, layer in network.named_modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear):
            signs = layer.binarization.weights(layer.weight.detach())
            state[f"network.{name}.weight"] = signs.to(torch.int8)
    size = read_config(directory_of(run))["dataset"]["image_size"]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(images)
        network.load_state_dict({key.removeprefix("network."): value for key, value in state.items()})
        same = torch.equal(before, network(images))
    kept = {"num_classes": checkpoint["num_classes"], "state_dict": state if same else checkpoint["state_dict"]}
    file = io.BytesIO()
    torch.save(kept, file)
    return file.getvalue()


def load_trained_network(directory: Path, weights: Literal["last", "best"] = "last") -> "torch.nn.Module":
    """Return a run's network as `load_network` does, without gradients of its own.

    Raises ConfigError, too, where the folder is not a run's, has no such weights or is not finished.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory} is no run's folder; give one that holds config.yaml (.../seed-0).")
    if not weights_file(directory, weights).is_file():
        if weights == "best" and not read_config(directory)["recipe"]["val_fraction"]:
            raise ConfigError(f"{directory} was trained without validation, so no weights of it are the best.")
        raise ConfigError(f"{directory} has no checkpoints/{weights}.ckpt; train it again with force=true.")
    if not (directory / "result.json").is_file():
        raise ConfigError(f"{directory} is not of a finished run; train to the end first.")
    return load_network(directory, weights).requires_grad_(False)


@dataclass(frozen=True)
class InputFormat:
    """The input of a run's network: images of ``image_size`` pixels a side, normalised by ``mean`` and ``std`` of the
    channels red, green and blue for pixels in [0, 1]. ``classes``: their names, and ``images``: a digest of all
    labels and pixels, None where an older run has not kept them."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    images: str | None = None

    def normalize(self, images: "Tensor") -> "Tensor":
        """Return uint8 images (B, 3, S, S) as the network takes them: (u / 255 - mean) / std, in float32.

        With the two roundings of training, u (1 / (255 std)) + (-mean / std): a sign may depend on them.
        """
        scale, shift = (value.to(images.device) for value in self.scale_and_shift())
        return images.float().mul(scale).add_(shift)  # float() of floats is no copy

    def scale_and_shift(self) -> "tuple[Tensor, Tensor]":
        """Return scale and shift of x = scale u + shift for pixels u, each (3, 1, 1), in float32."""
        import torch

        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return 1 / (255 * std), -mean / std


_INPUT = TypeAdapter(InputFormat)


def write_input_format(directory: Path, inputs: InputFormat) -> None:
    """Write ``input.json``."""
    write_text_atomic(directory / "input.json", json.dumps(asdict(inputs)) + "\n")


def load_input_format(run: OfRun | str | Path) -> InputFormat:
    """Return the input format of a run's network; for an older run, from its configuration.

    Raises DamagedFile where it cannot be read, ValueError where the configuration does not say it: an older run on
    dataset=folder, whose mean and standard deviation were measured.
    """
    directory = directory_of(run)
    content = read_run_file(directory, "input.json")
    try:
        if content is not None:
            return _INPUT.validate_json(content)
        config = read_config(directory)
        options = config["dataset"]
        mean, std = options["mean"], options["std"]
        if config["recipe"]["normalization"] == "imagenet":
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        if mean is None:
            raise ValueError(f"{directory} has no input.json: measure mean and std on its training images.")
        return InputFormat(options["image_size"], tuple(mean), tuple(std), None)
    except (ValidationError, KeyError, TypeError) as error:
        raise DamagedFile(directory / "input.json", _brief(error)) from error


@dataclass(frozen=True)
class Predictions:
    """What a run's network predicts for each test image, in the order of the test set, (N,), and whether it is right.

    ``last`` is with the last epoch's weights, ``best`` with those of the best validation epoch (None without a
    validation split). Runs with the same ``labels_sha256`` were tested on the same labels in the same order.
    """

    last: "NDArray[np.unsignedinteger]"
    last_correct: "NDArray[np.bool_]"
    best: "NDArray[np.unsignedinteger] | None"
    best_correct: "NDArray[np.bool_] | None"
    labels_sha256: str


def write_predictions(
    directory: Path, labels: "NDArray[np.int64]", last: "NDArray[np.int64]", best: "NDArray[np.int64] | None"
) -> None:
    """Write ``predictions.npz``: classes as uint8 (uint16 above 256 of them), correctness as packed bits."""
    import numpy as np

    arrays: dict[str, Any] = {"labels_sha256": np.array(hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest())}
    for name, predicted in (("last", last), ("best", best)):
        if predicted is not None:
            small = np.uint8 if max(labels.max(), predicted.max()) < 256 else np.uint16
            arrays |= {name: predicted.astype(small), f"{name}_correct": np.packbits(predicted == labels)}
    with writing(directory / "predictions.npz") as file:
        np.savez(file, **arrays)


def load_predictions(run: OfRun | str | Path) -> Predictions:
    """Return what a run predicted for the test images.

    Raises FileNotFoundError where it has kept nothing (older runs have not), DamagedFile where it cannot be read.
    """
    import numpy as np

    directory = directory_of(run)
    path = directory / "predictions.npz"
    content = read_run_file(directory, path.name)
    if content is None:
        raise FileNotFoundError(f"{directory} has no predictions.npz: the run is of an earlier version.")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found: dict[str, Any] = {key: arrays[key] for key in arrays.files}
        count = len(found["last"])
        for name in ("last", "best"):
            predicted = found.setdefault(name, None)
            bits = found.pop(f"{name}_correct", None)
            found[f"{name}_correct"] = None if bits is None else np.unpackbits(bits, count=count).astype(bool)
            if predicted is not None and (predicted.dtype.kind != "u" or predicted.shape != (count,)):
                raise ValueError(f"{name} is {predicted.dtype} {predicted.shape}")
        return Predictions(**{**found, "labels_sha256": str(found["labels_sha256"])})
    except Exception as error:  # decoding unknown bytes may raise anything
        raise DamagedFile(path, _brief(error)) from error
