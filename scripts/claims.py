"""Write the README's table of claims from the reports quoted: python scripts/claims.py

The block between the two marks in README.md is replaced. Every number in it is read from a report's CSV files below
results; a test compares the block with what this command would write.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from abn_exp.commandline import print_error
from abn_exp.report.formatting import replace_between
from abn_exp.report.looks import read_plan

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- written by scripts/claims.py -->", "<!-- end of what scripts/claims.py writes -->"
SPREAD = ("std_ratio", "std_ratio_low", "std_ratio_high", "spread_verdict", "spread_pairs")
TIME = ("time_over_bn", "time_over_bn_low", "time_over_bn_high", "verdict", "n")
# What the quoted analyses call it, which were made with an earlier version: what an analysis says of it now.
OF_ANALYSES = {"confirmed": "higher", "refuted": "lower", "not decided": "undecided"}
MEAN = ("difference", "difference_low", "difference_high", "verdict", "n")


def _number(text: str, form: str) -> str:
    return f"{float(text or 'nan'):z{form}}"


@dataclass(frozen=True)
class Finding:
    """A number of a report: the one row of a CSV file that ``where`` names; "x*" is what begins with x."""

    label: str
    file: str  # below results
    where: dict[str, str]
    columns: tuple[str, str, str, str, str] = MEAN  # value, low, high, verdict, n
    form: str = ".2f"
    judged: bool = True  # False: what it is compared with is 0 by construction

    def text(self) -> str:
        with open(ROOT / "results" / self.file, encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if all(fnmatchcase(r[k], v) for k, v in self.where.items())]
        if len(rows) != 1:
            raise ValueError(f"{self.file} has {len(rows)} rows with {self.where}; one is needed.")
        value, low, high, verdict, n = (rows[0][column] for column in self.columns)
        shown = [_number(text, self.form) for text in (value, low, high)]
        sign = "+" if self.columns is MEAN and self.judged and not shown[0].startswith("-") else ""
        interval = f" ({shown[1]} to {shown[2]})" if low else ""
        end = f", **{OF_ANALYSES.get(verdict, verdict)}**" if self.judged else ""
        return f"{self.label}: {sign}{shown[0]}{interval}, n = {n}{end}"


@dataclass(frozen=True)
class LatestLook:
    """The latest look at a planned comparison, as its plan recorded it: between looks a report does not show it."""

    label: str
    study: str

    def text(self) -> str:
        plan = read_plan(ROOT / "results/quoted" / self.study)
        if plan is None or not plan.entries:
            raise ValueError(f"results/quoted/{self.study} has no look at its planned comparison.")
        entry = plan.entries[-1]
        low, high = entry["interval"]
        found = f"{entry['difference']:+.2f} ({low:.2f} to {high:.2f}), n = {entry['pairs']}, **{entry['verdict']}**"
        return f"{self.label}, look {entry['look']} of {len(plan.looks)} (sequential interval): {found}"


@dataclass(frozen=True)
class Claim:
    claim: str
    command: str
    refuted_by: str
    scale: str  # of what was run so far
    found: tuple[Finding | LatestLook, ...]
    link: str
    remark: str = ""


def _cell(study: str, label: str, columns: tuple[str, str, str, str, str] = MEAN, **where: str) -> Finding:
    return Finding(label, f"quoted/{study}/report.csv", where, columns)


def _effect(study: str, label: str, what: str, table: str = "") -> Finding:
    return Finding(label, f"quoted/{study}/effects.csv", {"difference_of": f"{what}*", "table": f"{table}*"})


def _measure(study: str, kind: str, label: str, measure: str, form: str = ".3f", judged: bool = True) -> Finding:
    file = f"quoted/{study}/analysis/{kind}/comparison.csv"
    return Finding(label, file, {"norm": "abn", "measure": f"{measure}*"}, MEAN, form, judged)


def _inference(label: str, network: str, batch: int) -> Finding:
    width = {"BinaryNet": "3", "ResNet": "5"}[network]  # the paper's, which a quick benchmark has not
    where = {"network": network, "norm": "abn, 18 %", "engine": "OpenVINO", "batch": str(batch), "width": width}
    return Finding(label, f"{INFERENCE}/inference.csv", where, TIME)


INFERENCE = "benchmark/cpu-intel-r-xeon-r-processor-1-thread"
POOLED = "One effect over all cells"
ON_GPU = "planned, twenty pairs of trained networks"
CHANNELS = "share of channels with two thresholds, mean over layers"
INPUTS = "share of standard normal inputs whose sign takes the second, mean over layers"
CLAIMS = (
    Claim(
        "**C1** ABN is more accurate than BN",
        "`python train.py study=accuracy`",
        "worse, equivalent, or not better by delta",
        "SMALL",
        (
            _effect("accuracy", "abn - bn over five cells", "abn - bn", POOLED),
            _cell("accuracy", "CIFAR-10, BinaryNet 0.125", dataset="cifar10", model="binarynet", norm="abn"),
            _cell("accuracy", "CIFAR-10, ResNet 0.5", dataset="cifar10", model="resnet18_paper", norm="abn"),
            _cell("accuracy", "CIFAR-100, BinaryNet 0.125", dataset="cifar100", model="binarynet", norm="abn"),
            _cell("accuracy", "CIFAR-100, ResNet 0.5", dataset="cifar100", model="resnet18_paper", norm="abn"),
            _cell(
                "accuracy",
                "part of TinyImageNet (2,000 test images), BinaryNet 0.125",
                dataset="tinyimagenet",
                norm="abn",
            ),
            _effect("variance", "abn - bn over two cells, 20 seeds", "abn - bn", POOLED),
            LatestLook("planned, `study=trained`: whole CIFAR-10, BinaryNet 0.25", "trained"),
            _cell("trained-gpu", "planned, the same with other seeds on a GPU", norm="abn"),
        ),
        "[report](results/quoted/accuracy/report.md), [20 seeds](results/quoted/variance/report.md), "
        "[planned](results/quoted/trained/report.md), [on a GPU](results/quoted/trained-gpu/report.md)",
        "The runs of BinaryNet 0.125 are also in C2, `confound` and `protocols`: these are not independent evidence.",
    ),
    Claim(
        "**C2** ABN varies less between seeds",
        "`python train.py study=variance`",
        "ABN's std above BN's, by a permutation test within seeds",
        "BinaryNet 0.125, SMALL",
        (
            _cell("variance", "std ratio on CIFAR-10", SPREAD, dataset="cifar10", model="binarynet", norm="abn"),
            _cell("variance", "std ratio on CIFAR-100", SPREAD, dataset="cifar100", model="binarynet", norm="abn"),
            _cell("trained-gpu", "planned, whole CIFAR-10, BinaryNet 0.25, on a GPU: std ratio", SPREAD, norm="abn"),
        ),
        "[report](results/quoted/variance/report.md), [planned](results/quoted/trained-gpu/report.md)",
    ),
    Claim(
        "**C3** what each parameter of ABN is worth",
        "`python train.py study=ablation`",
        "a part that changes nothing, or harms",
        "BinaryNet 0.25 on CIFAR-10, SMALL",
        tuple(
            _effect("ablation", label, f"On cifar10 with binarynet, {what}")
            for label, what in (
                ("forward shape (main effect)", "the gate's forward shape, "),
                ("gradient shape (main effect)", "the shape of the gate's gradient, "),
                ("without the shift", "leaving out the shift"),
                ("scale behind the gate", "a scale behind the gate"),
                ("scale inside the gate", "a scale inside the gate"),
            )
        ),
        "[report](results/quoted/ablation/report.md)",
    ),
    Claim(
        "**C4** ABN captures image features",
        "`python scripts/analyze.py cam results/NAME`",
        "maps that score below BN's",
        "the networks of C3, 500 images",
        (
            _measure("ablation", "cam", "deletion gain", "deletion gain"),
            _measure("ablation", "cam", "insertion gain", "insertion gain"),
            _measure("trained-gpu", "cam", f"{ON_GPU}: deletion gain", "deletion gain"),
            _measure("trained-gpu", "cam", "the same, not planned: insertion gain", "insertion gain"),
        ),
        "[maps](results/quoted/ablation/analysis/cam/summary.md), "
        "[planned](results/quoted/trained-gpu/analysis/cam/summary.md)",
    ),
    Claim(
        "**C5** its activations are more imbalanced, and it has additional activation functions",
        "`python scripts/analyze.py activations results/NAME`",
        "imbalance not above BN's; second thresholds that are not there or not used",
        "the networks of C3, 10,000 images",
        (
            _measure("ablation", "activations", "imbalance", "channel imbalance"),
            _measure("ablation", "activations", CHANNELS, "share of channels", ".3f", judged=False),
            _measure("ablation", "activations", INPUTS, "share of inputs", ".0e", judged=False),
            _measure("trained-gpu", "activations", f"{ON_GPU}: imbalance", "channel imbalance"),
            _measure("trained-gpu", "activations", f"the same: {CHANNELS}", "share of channels", ".3f", judged=False),
            _measure("trained-gpu", "activations", f"the same: {INPUTS}", "share of inputs", ".0e", judged=False),
        ),
        "[activations](results/quoted/ablation/analysis/activations/summary.md), "
        "[planned](results/quoted/trained-gpu/analysis/activations/summary.md)",
        "BN cannot have a second threshold: both shares are 0 with it by construction, and nothing is tested.",
    ),
    Claim(
        "is the published comparison like for like?",
        "`python train.py study=confound`",
        "each switch changes nothing",
        "BinaryNet 0.125 on CIFAR-10, SMALL",
        (
            _effect(
                "confound", "Adam rebuilt each epoch", "optimizer.rebuild_each_epoch true instead of false, over"
            ),
            _effect("confound", "momentum 0.9", "norm.momentum 0.9 instead of 0.1, over"),
            _effect(
                "confound",
                "the published momenta, abn at 0.9 - bn at 0.1, mean with and without the rebuild",
                "abn at momentum 0.9 - bn at 0.1, over",
            ),
        ),
        "[report](results/quoted/confound/report.md)",
    ),
    Claim(
        "what of it is left, like for like?",
        "`python train.py study=protocols`",
        "the difference is the same under both",
        "BinaryNet 0.125 on CIFAR-10, SMALL",
        (_effect("protocols", "change of the difference from `fixed` to `paper`", "abn - bn is"),),
        "[report](results/quoted/protocols/report.md)",
    ),
    Claim(
        "what does ABN cost at inference?",
        "`python scripts/benchmark.py --inference`",
        "a network that takes longer",
        "the paper's networks exported, OpenVINO, one thread of an AVX-512 CPU, time over BN's (at most one "
        "comparison of integers more in a channel)",
        tuple(
            _inference(f"{network}, batch {batch}", network, batch)
            for network in ("BinaryNet", "ResNet")
            for batch in (1, 64)
        ),
        f"[benchmark](results/{INFERENCE}/inference.md)",
        "18 % of channels with two thresholds, as after the six epochs of C5; n counts repetitions.",
    ),
)


def block() -> str:
    """Return the table of claims as Markdown."""
    lines = ["| claim | command | what would refute it | found (exploratory unless planned, points unless said) | |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for c in CLAIMS:
        found = "<br>".join(filter(None, [f"{c.scale}:", *(finding.text() for finding in c.found), c.remark]))
        lines.append(f"| {c.claim} | {c.command} | {c.refuted_by} | {found} | {c.link} |")
    return "\n".join(lines)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    readme = ROOT / "README.md"
    try:
        text = replace_between(readme.read_text(encoding="utf-8"), BEGIN, END, block())
        readme.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        return print_error(error)
    print(f"written to {readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
