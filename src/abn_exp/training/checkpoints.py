"""Checkpoints: written atomically and in the background, verified when read."""

import io
import logging
import os
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from abn_exp.errors import DamagedFile
from abn_exp.files import writing
from abn_exp.trained_network import read_checkpoint

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, and keeps the one before `last.ckpt`.

    Lightning writes to the system's temporary folder; where that is another file system, its "rename" is a copy,
    and a full disk or a kill leaves half a file under the final name.

    A thread writes to the disk while training goes on. The bytes are final before `save_checkpoint` returns; the next
    save, or the end of the run, waits until they are written, and raises an error of the disk.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.teardown()
        pending: Future[None] = Future()
        # Not an executor's: a signal while that starts its thread leaves one that waits for work and never ends.
        Thread(target=_write, args=(pending, buffer, Path(path)), name="checkpoint").start()
        self._pending = pending

    def teardown(self) -> None:
        """Wait for the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove nothing: a new checkpoint replaces the old one, and other paths may come from an unknown file."""

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Return `read_checkpoint(path)`: verified, and nothing in it is executed."""
        return read_checkpoint(path)


def _write(done: Future[None], buffer: io.BytesIO, path: Path) -> None:
    """Write in the thread; what goes wrong comes up where the next save, or the end of the run, waits for `done`."""
    try:
        _write_checkpoint(buffer, path)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


def _write_checkpoint(buffer: io.BytesIO, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        file.write(buffer.getbuffer())
        if path.name == "last.ckpt" and path.exists():
            file.flush()
            os.fsync(file.fileno())
            os.replace(path, previous(path))


def previous(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept."""
    return path.with_name(f"previous-{path.name}")


def checkpoints(directory: Path, *, keep_best: bool) -> list[pl.Callback]:
    """Return the callbacks that save `last.ckpt` after every epoch and, if asked, `best.ckpt` by `val/acc`.

    Only ends of epochs are saved: a checkpoint inside an epoch resumes on other batches.
    """
    best: dict[str, Any] = {"filename": "best", "monitor": "val/acc", "mode": "max", "save_weights_only": True}
    common: dict[str, Any] = {
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    kinds = [*[best] * keep_best, {"filename": "last"}]  # in this order: last.ckpt knows what best.ckpt holds
    return [_Checkpoint(directory / "checkpoints", **common, **kind) for kind in kinds]


class _Checkpoint(ModelCheckpoint):
    """A ModelCheckpoint that may be resumed in another folder than the one in which it was saved.

    Lightning's own forgets the best score where the folder's name has changed.
    """

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = str(self.dirpath)

        def here(path: str) -> str:
            return os.path.join(folder, os.path.basename(path)) if path else path

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": folder})


def keep_weights(directory: Path) -> None:
    """Remove the optimizer's state, most of the bytes, from a finished run's checkpoints.

    A run whose epochs are all done can still be resumed from such a `last.ckpt`: a damaged record is written again.
    What cannot be read or written is left, with a warning: the run's record exists.
    """
    last = directory / "checkpoints" / "last.ckpt"
    try:
        checkpoint = read_checkpoint(last)
        buffer = io.BytesIO()  # torch's own error on a full disk is no OSError
        torch.save({**checkpoint, "optimizer_states": [], "lr_schedulers": []}, buffer)
        with writing(last) as file:
            file.write(buffer.getbuffer())
        previous(last).unlink(missing_ok=True)
    except (DamagedFile, OSError) as error:
        log.warning("%s; the optimizer's state stays in the checkpoints", error)


def usable_checkpoint(path: Path) -> Path | None:
    """Return `path` where it is whole, else the checkpoint before it, else None; warn of a damaged one."""
    for candidate in (path, previous(path)):
        try:
            read_checkpoint(candidate)
        except FileNotFoundError:
            continue
        except (DamagedFile, OSError) as error:
            log.warning("%s; going on from the checkpoint before it, or from the start where there is none", error)
            continue
        return candidate
    return None
