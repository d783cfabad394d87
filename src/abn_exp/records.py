"""The compact record of a study: `records.tar.xz`, one file that holds what all its runs wrote.

It is an ordinary archive: `tar xf results/quoted/NAME/records.tar.xz -C results/NAME` makes the runs' folders again,
each with its SHA256SUMS. Its members are `command.txt`, `plan.json`, `looks.json` and
`<dataset>/<model>/<norm>/<variant>/seed-<k>/<file>` of each run, sorted, without owners, permissions or dates: the
same runs make the same bytes, in whatever order they were added. Checkpoints stay behind. Where it was asked for,
`networks.tar.xz`, made in the same way, holds a `network.ckpt` of each run. Reading executes and writes nothing.
"""

import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from abn_exp.errors import DamagedFile
from abn_exp.files import writing

RECORDS = "records.tar.xz"
NETWORKS = "networks.tar.xz"  # beside it, read only where a network is wanted
NETWORK = "network.ckpt"  # of a run: the network that it ended with, with the signs of its binary weights
COMMAND = "command.txt"  # of a study: what was typed, a line each
LOOKS = "looks.json"  # of a study: by cell, at how many seeds its reports were written
STUDY_FILES = (COMMAND, "plan.json", LOOKS)  # beside the runs
RUN_FILES = (  # of a run's folder; checkpoints and locks are no part of its record
    *("config.yaml", "input.json", "metrics.jsonl", "result.json", "SHA256SUMS", "FAILED", "predictions.npz"),
    *("train.log", "wandb-run-id"),
)
# Of an archive once it is unpacked. A run takes 15 kB, and 20 kB more with its predictions; a network up to 40 MB.
MAX_BYTES = {RECORDS: 2**29, NETWORKS: 2**32}

_MEMBER = re.compile(rf"{'|'.join(map(re.escape, STUDY_FILES))}|([^/]+/){{4}}seed-[0-9]+/[^/]+")


def read_records(archive: Path) -> Mapping[str, bytes]:
    """Return the files in a study's archive by their names in it. Raises DamagedFile where it is not whole."""
    stat = archive.stat()
    return _read(archive, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _read(archive: Path, mtime: int, size: int) -> Mapping[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        content = unpacker.decompress(archive.read_bytes(), MAX_BYTES[archive.name])
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("its end is missing, or something follows it")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                parts = member.name.split("/")
                if not (member.isreg() and _MEMBER.fullmatch(member.name)) or {".", ".."} & set(parts):
                    raise ValueError(f"it has a member {member.name!r}")
                stream = tar.extractfile(member)
                assert stream is not None
                files[member.name] = stream.read()
    except (lzma.LZMAError, tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedFile(archive, error) from error
    return files


def write_records(archive: Path, files: Mapping[str, bytes]) -> None:
    """Write a study's archive from its files by their names in it; the same files make the same bytes. Raises
    ValueError for more than can be read again."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if content.tell() > MAX_BYTES[archive.name]:
        raise ValueError(f"{archive} would hold {content.tell() / 1e9:.1f} GB, which is more than is read again.")
    with writing(archive) as file:
        file.write(lzma.compress(content.getvalue(), preset=6))


def archived_runs(folder: Path) -> Iterator[Path]:
    """Yield the directory, within its study's folder, of every run below `folder` that an archive holds.

    The directory need not exist: `read_run_file` finds the run's files. Raises DamagedFile.
    """
    above = [parent / RECORDS for parent in (folder, *folder.parents)[:5] if (parent / RECORDS).is_file()]
    for archive in sorted({*above, *folder.rglob(RECORDS)}):
        names = {name.rpartition("/")[0] for name in read_records(archive) if name.endswith("/config.yaml")}
        directories = (archive.parent / name for name in sorted(names))
        yield from (directory for directory in directories if directory.is_relative_to(folder))


def read_run_file(directory: Path, name: str) -> bytes | None:
    """Return a file of a run, from its own directory or from its study's archive; None where there is none.

    Raises OSError where it cannot be read, DamagedFile where the archive is not whole.
    """
    path = directory / name
    if directory.is_dir():
        return path.read_bytes() if path.is_file() else None
    whole = directory.absolute()
    study = Path(*whole.parts[:-5])
    archive = study / (NETWORKS if name == NETWORK else RECORDS)
    if len(whole.parts) > 5 and archive.is_file():
        return read_records(archive).get((whole / name).relative_to(study).as_posix())
    return None


def read_study_file(folder: Path, name: str) -> bytes | None:
    """Return a file of a study, from its folder or from its archive; None where there is none. Raises DamagedFile."""
    path = folder / name
    if path.is_file():
        return path.read_bytes()
    archive = folder / RECORDS
    return read_records(archive).get(name) if archive.is_file() else None


def read_looks(path: Path, content: bytes | None) -> dict[str, list[int]]:
    """Return what `looks.json` holds; nothing where it is None. Raises DamagedFile, which names ``path``."""
    try:
        found = {} if content is None else json.loads(content)
        return {key: [int(n) for n in counts] for key, counts in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedFile(path, error) from error


def unite_looks(path: Path, *contents: bytes | None) -> bytes:
    """Return one `looks.json` for several. Raises DamagedFile, which names ``path``."""
    found: dict[str, list[int]] = {}
    for content in contents:
        for key, counts in read_looks(path, content).items():
            found[key] = sorted({*found.get(key, []), *counts})
    return (json.dumps(found, indent=1) + "\n").encode()


def read_command(folder: Path) -> str:
    """Return the commands that made a study, a line each; empty where none was recorded."""
    return (read_study_file(folder, COMMAND) or b"").decode()
