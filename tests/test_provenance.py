"""What a record says of code, libraries and hardware."""

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abn_exp import provenance


def test_commit_is_recorded_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    for path in ("norm.py", "conf.yaml"):
        (tmp_path / path).write_text("a = 1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*words)
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src" / "provenance.py"))
    commit = provenance.git_commit.__wrapped__
    clean = commit()
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{40}", clean)
    for path in ("norm.py", "conf.yaml"):  # beside the package, too
        (tmp_path / path).write_text("a = 2\n")
        assert commit() == f"{clean}-dirty"
        git("checkout", path)
    assert commit() == clean
    shutil.rmtree(tmp_path / ".git")
    assert commit() is None


def test_the_digest_of_the_code_covers_what_can_change_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(provenance.__file__).parent
    shutil.copytree(package, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "provenance.py"))
    digest = provenance.code_digest.__wrapped__
    before = digest()
    assert before == provenance.code_digest()
    for name in ("report/stats.py", "analysis/cam.py", "deploy/onnx.py"):
        with open(tmp_path / "package" / name, "a") as file:
            file.write("# changed\n")
    (tmp_path / "package" / "notes.txt").write_text("of no effect")
    assert digest() == before
    found = {before}
    for name in ("norm.py", "models/resnet.py", "training/classifier.py"):
        with open(tmp_path / "package" / name, "a") as file:
            file.write("# changed\n")
        found.add(digest())
    (tmp_path / "package" / "data" / "more.py").touch()
    assert len(found | {digest()}) == 5


def test_a_file_of_one_s_own_has_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "abn_exp" / "my_norm.py"  # as in a clone
    path.parent.mkdir()
    path.write_text("EPS = 1e-5\n")
    monkeypatch.syspath_prepend(path.parent)
    importlib.import_module("my_norm")
    found = provenance.own_code(["my_norm", "abn_exp.norm", "torch.nn", "gone", "builtins"])
    assert found == {"my_norm.py": hashlib.sha256(b"EPS = 1e-5\n").hexdigest()[:12]}
    path.write_text("EPS = 1e-3\n")
    assert provenance.own_code(["my_norm"]) == found  # which is what runs in this process
    provenance._file_digest.cache_clear()
    assert provenance.own_code(["my_norm"]) != found
    del sys.modules["my_norm"]


def test_versions_say_what_last_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True, "amx_tile": False, "sse": True})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = provenance.versions()
    assert found["torch"] == torch.__version__  # with its build
    assert (found["cuda"], found["cudnn"]) == ("13.0", "92600")
    assert found["cpu capability"] == "AVX512, avx512_vnni, ONEDNN_MAX_CPU_ISA=AVX2"
    assert found["numpy"] == importlib.metadata.version("numpy")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that does not tell
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    found = provenance.versions()
    assert not found.keys() & {"cuda", "cudnn"}
    assert found["cpu capability"] == "AVX512"


def test_a_distribution_without_metadata_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", version)
    found = provenance.versions()
    assert found["abn_exp"] == found["pytorch-lightning"] == "unknown"
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in found.values())
