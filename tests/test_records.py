import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest

from abn_exp import records
from abn_exp.errors import DamagedFile
from abn_exp.records import RECORDS, archived_runs, read_command, read_records, read_run_file, write_records

RUN = "digits/binarynet/bn/fixed/seed-0"
FILES = {
    "command.txt": b"python train.py -m norm=bn\n",
    f"{RUN}/config.yaml": b"a: 1\n",
    f"{RUN}/predictions.npz": bytes(range(256)) * 40,
    f"digits/binarynet/{'n' * 90}/{'v' * 120}/seed-12/config.yaml": b"a: 2\n",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "study").mkdir()
    write_records(tmp_path / "study" / RECORDS, FILES)
    return tmp_path / "study" / RECORDS


def test_what_is_written_is_read_and_the_same_files_make_the_same_bytes(archive: Path) -> None:
    assert read_records(archive) == FILES
    before = archive.read_bytes()
    write_records(archive, dict(reversed(FILES.items())))
    assert archive.read_bytes() == before


def test_the_system_tar_unpacks_the_folders_of_runs(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "unpacked"
    out.mkdir()
    subprocess.run(["tar", "xf", archive, "-C", out], check=True)
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == FILES


def test_a_run_is_found_by_the_directory_it_would_have(archive: Path) -> None:
    study = archive.parent
    assert len(list(archived_runs(study.parent))) == len(list(archived_runs(study))) == 2
    assert list(archived_runs(study / "digits" / "binarynet" / "bn")) == [study / RUN]
    assert read_run_file(study / RUN, "config.yaml") == b"a: 1\n"
    assert read_run_file(study / RUN, "FAILED") is None
    assert read_run_file(study / "digits" / "binarynet" / "bn" / "fixed" / "seed-1", "config.yaml") is None
    assert read_command(study) == "python train.py -m norm=bn\n"


def test_a_folder_of_its_own_is_not_mixed_with_the_archive(archive: Path) -> None:
    directory = archive.parent / RUN
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("a: 3\n")
    assert read_run_file(directory, "config.yaml") == b"a: 3\n"
    assert read_run_file(directory, "predictions.npz") is None


def test_every_changed_byte_and_every_cut_is_damage(archive: Path) -> None:
    whole = archive.read_bytes()
    for index in range(0, len(whole), 7):
        archive.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(DamagedFile, match=f"{RECORDS} is damaged"):
            read_records(archive)
        archive.write_bytes(whole[:index])
        with pytest.raises(DamagedFile):
            read_records(archive)
    archive.write_bytes(whole + b"more")
    with pytest.raises(DamagedFile, match="something follows"):
        read_records(archive)


@pytest.mark.parametrize("name", ["../../a/b/c/seed-0/config.yaml", "/etc/passwd", f"{RUN}/x/y", "readme.md"])
def test_a_member_that_no_record_has_is_damage(archive: Path, name: str) -> None:
    write_records(archive, {name: b"x"})
    with pytest.raises(DamagedFile, match="has a member"):
        read_records(archive)


def test_a_link_is_damage_and_a_bomb_is_not_unpacked(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        link = tarfile.TarInfo(f"{RUN}/config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DamagedFile, match="has a member"):
        read_records(archive)
    monkeypatch.setitem(records.MAX_BYTES, archive.name, 2**20)
    archive.write_bytes(lzma.compress(bytes(2**21)))
    with pytest.raises(DamagedFile, match="its end is missing"):
        read_records(archive)
