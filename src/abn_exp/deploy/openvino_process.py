"""Run an OpenVINO model on the arrays that come in: python -m abn_exp.deploy.openvino_process MODEL THREADS

Images come on standard input, and all results of the model follow on standard output, as `send` writes arrays.
"""

import io
import os
import sys
from typing import IO, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray


def send(stream: IO[bytes], array: NDArray[Any]) -> None:
    """Write an array in numpy's format, and before it its length in eight bytes."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    stream.write(len(content.getbuffer()).to_bytes(8, "little"))
    stream.write(content.getbuffer())


def receive(stream: IO[bytes]) -> NDArray[Any]:
    """Return what `send` wrote. Raises EOFError where there is no more."""
    length = stream.read(8)
    content = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8:
        raise EOFError
    return np.load(io.BytesIO(content), allow_pickle=False)


def main() -> None:
    path, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    core = ov.Core()
    model = core.read_model(path)
    options = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    request, shape = None, None
    while True:
        try:
            images = receive(sys.stdin.buffer)
        except EOFError:
            return
        if request is None or images.shape != shape:
            shape = images.shape
            model.reshape(list(shape))
            request = core.compile_model(model, "CPU", options).create_infer_request()
        results = request.infer([images])
        for output in range(len(model.outputs)):
            send(answers, results[output])
        answers.flush()


if __name__ == "__main__":
    main()
