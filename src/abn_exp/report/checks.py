"""What the runs of a report share, so that its intervals are conditional on it, and where compared runs differ."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from abn_exp.report.comparisons import Cell, group_cells
from abn_exp.results import Run
from abn_exp.trained_network import load_input_format


def conditional_on(configs: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on what all seeds share, so that no interval over seeds covers it."""
    shared = ["this test set"]
    subsets = {config.get("dataset", {}).get("train_images") for config in configs}
    if subsets - {None}:
        sizes = ", ".join(f"{size:,}" for size in sorted(size for size in subsets if size is not None))
        shared.append(f"this subset of {sizes} training images")
    else:
        shared.append("these training images")
    fractions = {config.get("recipe", {}).get("val_fraction") for config in configs}
    if fractions - {None, 0}:
        shared.append("this split into training and validation images")
    return f"All of them are conditional on what the seeds share: {', '.join(shared[:-1])} and {shared[-1]}."


def provenance_differences(cells: Sequence[Cell]) -> list[str]:
    """Return a sentence for each group whose runs differ in code, device, threads or versions."""
    lines = []
    if devices := sorted({cell.device for cell in cells if cell.device is not None}):
        lines.append(
            f"Trained on several kinds of device ({', '.join(devices)}), whose arithmetic is not the same: each kind "
            "has its own cells, and norms are compared on the same kind alone."
        )
    for (dataset, model, variant), group in group_cells(cells).items():
        made = [(cell.norm, _provenance(run)) for cell in group for run in cell.runs if run.result is not None]
        # Commits tell versions of the code apart where a run has no digest of it.
        left_out = "git commit" if all(how["code"] is not None for _, how in made) else "code"
        different = []
        for name in dict.fromkeys(name for _, how in made for name in how if name != left_out):
            by_value: dict[str | None, Counter[str]] = {}
            for norm, how in made:
                if name in how or not _may_lack(name):
                    by_value.setdefault(how.get(name), Counter())[norm] += 1
            if len(by_value) > 1:
                told = (f"{_short(value)} ({_counts(norms)})" for value, norms in by_value.items())
                different.append(f"{name}: {', '.join(told)}")
        if different:
            where = f"{dataset} with {model} ({variant})"
            lines.append(f"Runs that are compared were not all made alike. {where}: {'; '.join(different)}.")
    return lines


def _may_lack(name: str) -> bool:
    """Tell whether runs without this name are as good: a file of code that another norm has, what older ones lack."""
    return name == "images" or name.endswith(".py")


def _provenance(run: Run) -> dict[str, str | None]:
    """Return what can change a result besides the configuration; of a run in several parts "one, then another"."""
    result = run.result
    assert result is not None
    last = {name: getattr(result, name) for name in ("code", "git_commit", "device", "threads", "versions")}
    parts = [_made_with(part) for part in [*result.earlier, last]]
    found = {
        name: dict.fromkeys(part.get(name) for part in parts)
        for name in dict.fromkeys(n for part in parts for n in part)
    }
    how = {n: next(iter(v)) if len(v) == 1 else ", then ".join(map(_short, v)) for n, v in found.items()}
    with suppress(ValueError):  # an older run has no such file
        if (images := load_input_format(run).images) is not None:
            how["images"] = images
    return how


def _made_with(part: Mapping[str, Any]) -> dict[str, str | None]:
    versions = {name: version for name, version in part["versions"].items() if name != "abn_exp"}
    how = {
        "code": part["code"],
        "git commit": part["git_commit"],
        "device": part["device"],
        "threads": None if part["threads"] is None else str(part["threads"]),
    }
    return how | versions


def _short(value: str | None) -> str:
    if value is None:
        return "unknown"
    return value[:7] if len(value) == 40 else str(value)


def _counts(norms: Counter[str]) -> str:
    return ", ".join(f"{norm} {n}" for norm, n in norms.items())
