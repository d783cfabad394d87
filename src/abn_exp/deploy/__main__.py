"""Classify images with an exported network: python -m abn_exp.deploy network.onnx IMAGE...

Needs ONNX Runtime, numpy and Pillow, and nothing else. The class names and the image size are in the file.
"""

import argparse
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

FORMAT = "abn_exp 1"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # decoded by Pillow itself, by no other program
BATCH = 100  # images at a time: a map of the paper's network takes 1.6 MB an image


@dataclass(frozen=True)
class Classifier:
    """An exported network, ready to run."""

    session: onnxruntime.InferenceSession
    classes: list[str]
    image_size: int

    @classmethod
    def open(cls, path: Path) -> "Classifier":
        """Return the network in a file. Raises ValueError or OSError, in a sentence, for any other file."""
        content = path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(content, options)
            metadata = session.get_modelmeta().custom_metadata_map
        except Exception as error:  # decoding unknown bytes may raise anything
            raise ValueError(f"{path} is damaged, or no ONNX file: {str(error).splitlines()[0]}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} was not written by scripts/export.py: it names no classes and no image size.")
        digest = metadata.get("sha256", "-").encode()
        if hashlib.sha256(content.replace(digest, b"0" * len(digest))).hexdigest().encode() != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one it was written with; export it again.")
        return cls(session, json.loads(metadata["classes"]), int(metadata["image_size"]))

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Return an image as (3, S, S). Raises ValueError or OSError where it is not one of that size."""
        try:
            with Image.open(path, formats=FORMATS) as image:
                mode = image.mode
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} is no image that is read here: {', '.join(FORMATS)}.") from error
        if mode.startswith(("I", "F")):  # Pillow clips these to 255
            raise ValueError(f"{path} has more than 8 bits a channel (mode {mode}); convert it first.")
        height, width, _ = pixels.shape
        if (height, width) != (self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(
                f"{path} has {width} x {height} pixels; this network takes {size} x {size}; scale it first."
            )
        return pixels.transpose(2, 0, 1)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the probabilities of the classes, (B, classes), of images (B, 3, S, S)."""
        (logits,) = self.session.run(None, {"images": images})
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def main() -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may have characters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m abn_exp.deploy", description="Classify images.")
    parser.add_argument("file", type=Path, help="network.onnx, written by scripts/export.py")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=", ".join(FORMATS))
    arguments = parser.parse_args()
    try:
        classifier = Classifier.open(arguments.file)
        images = np.stack([classifier.read(path) for path in arguments.images])
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    parts = [classifier(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
    for path, probabilities in zip(arguments.images, np.concatenate(parts), strict=True):
        best = int(probabilities.argmax())
        print(f"{path}: {classifier.classes[best]} ({probabilities[best]:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
