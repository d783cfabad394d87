"""Reading records of earlier versions."""

from pathlib import Path

import pytest

from abn_exp.results import read_config
from tests.helpers.records import finish_run, start_run

AUTO = "precision: auto\n"


@pytest.mark.parametrize(
    ("device", "precision"),
    [("CPU (AMD EPYC, 1 thread)", "fp32"), ("NVIDIA H200", "fp32"), ("NVIDIA H200, exact16", "exact16")],
)
def test_precision_auto_of_an_older_record_is_what_its_device_says(
    device: str, precision: str, tmp_path: Path
) -> None:
    finished = finish_run(tmp_path, "bn", 0, 0.5, device=device, config=AUTO)
    assert read_config(finished) == {"precision": precision}
    begun = start_run(tmp_path, "bn", 1, config=AUTO)
    (begun / "train.log").write_text(f"2026-11-20 10:00:00 digits-binarynet-bn-fixed seed 1 on {device}\n| table |\n")
    assert read_config(begun) == {"precision": precision}


def test_precision_auto_of_a_run_that_recorded_no_device_is_fp32(tmp_path: Path) -> None:
    assert read_config(start_run(tmp_path, "bn", 0, config=AUTO)) == {"precision": "fp32"}
    assert read_config(start_run(tmp_path, "bn", 1, config="precision: bf16\n")) == {"precision": "bf16"}
