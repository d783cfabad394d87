"""Wrong command lines and configuration files: refused before anything starts, in words."""

import itertools
import random
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from abn_exp.commandline import HYDRA_ERRORS, check_groups, hydra_sentence
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from tests.helpers.cli import Cli
from tests.helpers.faults import FULL, Account
from tests.helpers.runs import REPOSITORY, TINY

Make = Callable[..., RunPlan]

NUMBER = ["abc", "[]", "[1]", "{a: 1}", "nan", "inf", "-inf", "''", "true", "é"]
COUNT = [*NUMBER, "null", "-1", "1.5", "1e3", "99999999999999999999999999"]
SWITCH = ["abc", "null", "[]", "{}", "2", "''", "0.5"]
CHOICE = ["abc", "null", "[]", "{}", "''", "1", "true", "../x"]
TEXT = ["null", "[]", "{a: 1}", "1", "true"]

WRONG: dict[str, list[str]] = {
    "seed": COUNT,
    "precision": [*CHOICE, "fp16", "32"],
    "name": [*TEXT, "''", "../up", "/tmp/x", "a/b", "..", ".hidden", "a b", "ü", "a" * 81, "'a\nb'", "-x"],
    "question": ["1", "[]", "{a: 1}", "true"],
    "results_dir": [*TEXT, "''", "'a\0b'"],
    "force": SWITCH,
    "device": [*CHOICE, "gpu", "cuda:0"],
    "devices": [*COUNT, "0"],
    "sync_norm": SWITCH,
    "threads": [*COUNT, "0"],
    "seeds_at_once": [*COUNT, "0", "many"],
    "deterministic": SWITCH,
    "progress": CHOICE,
    "keep": CHOICE,
    "init_from": ["''", "1", "[]", "true", "/nowhere", "conf"],
    "dataset.name": [*CHOICE, "mnist"],
    "dataset.root": TEXT,
    "dataset.path": ["1", "[]", "true", "/somewhere"],
    "dataset.download": SWITCH,
    "dataset.num_classes": ["abc", "1", "0", "-1", "1.5", "[]", "true"],
    "dataset.image_size": [*COUNT, "0", "4", "33", "8192"],
    "dataset.mean": ["1", "abc", "[]", "[0.5]", "[0.5,0.5]", "[0,0,0,0]", "[nan,0,0]", "[a,b,c]", "null", "{a: 1}"],
    "dataset.std": ["1", "abc", "[]", "[0.5]", "[0,1,1]", "[-1,1,1]", "[inf,1,1]", "[a,b,c]", "null", "{a: 1}"],
    "dataset.flip": SWITCH,
    "dataset.padding": [*COUNT, "32", "1000"],
    "dataset.train_images": ["abc", "0", "-1", "1.5", "[]", "true", "inf"],
    "recipe.epochs": [*COUNT, "0", "100001"],
    "recipe.batch_size": [*[wrong for wrong in COUNT if not wrong.startswith("99")], "0", "1"],
    "recipe.optimizer.name": [*CHOICE, "adamw"],
    "recipe.optimizer._target_": ["''", "1", "[]", "os.system", "torch.optim.Nothing", "torch.nn.Linear"],
    "recipe.optimizer.lr": [*NUMBER, "null", "0", "-0.1", "1e400"],
    "recipe.optimizer.momentum": [*NUMBER, "null", "1", "-0.1"],
    "recipe.optimizer.weight_decay": [*NUMBER, "null", "-1"],
    "recipe.optimizer.rebuild_each_epoch": SWITCH,
    "recipe.schedule.name": [*CHOICE, "step"],
    "recipe.schedule.warmup_epochs": [*COUNT, "12", "1000"],
    "recipe.label_smoothing": [*NUMBER, "null", "1", "-0.1"],
    "recipe.clip_grad_norm": [*NUMBER, "0", "-1"],
    "recipe.clip_latent_weights": SWITCH,
    "recipe.clip_latent_range": ["null", "1", "abc", "[]", "[0.5]", "[1,0]", "[-1,1]", "[0,nan]", "[a,b]", "{a: 1}"],
    "recipe.init": CHOICE,
    "recipe.val_fraction": [*NUMBER, "null", "1", "-0.1"],
    "recipe.split_seed": COUNT,
    "recipe.normalization": CHOICE,
    "recipe.paired_init": SWITCH,
    "recipe.test_every_epoch": SWITCH,
    "recipe": ["1", "abc", "null", "[]"],
    "wandb.mode": [*CHOICE, "dryrun"],
    "wandb.project": [*TEXT, "a/b", "a" * 129],
    "wandb.entity": ["1", "[]", "true"],
    "wandb.dir": TEXT,
    "wandb.tags": ["1", "null", "[1]", "{a: 1}"],
    "wandb.notes": ["1", "[]", "true"],
    "model._target_": ["null", "''", "1", "os.system", "abn_exp.models.nothing", "nothing", "torch.nn.Linear", "[]"],
    "model.width": [*NUMBER, "null", "0", "-1", "1e6"],
    "model.binarization": ["1", "abc", "null", "[]", "{_target_: os.system}", "{_target_: torch.nn.Identity}"],
    "model.binarization.weight_estimator": CHOICE,
    "model.binarization.activation_estimator": CHOICE,
    "model.binarization.sign_zero": CHOICE,
    "model.binarization.pad_value": [*NUMBER, "null", "2", "0.5"],
    "+model.num_classes": ["3"],
    "+model.norm_layer": ["abc"],
    "+model._partial_": ["true"],
    "norm._target_": [
        "null",
        "''",
        "1",
        "os.system",
        "builtins.exec",
        "abn_exp.norm.nothing",
        "abn_exp.models.resnet18",
    ],
    "norm._partial_": ["false", "null", "abc"],
    "norm.eps": [*NUMBER, "null", "0", "-1"],
    "norm.momentum": [*NUMBER, "null", "0", "2", "-0.1"],
    "norm.gate": CHOICE,
    "norm.scale": CHOICE,
    "norm.shift": SWITCH,
    "norm.unbiased": SWITCH,
    "norm.persistent_stats": SWITCH,
    "+norm.num_features": ["3"],
    **{
        group: ["nothing", "''", "[]", "../norm/abn", "/norm/abn"] for group in ("dataset", "model", "norm", "recipe")
    },
    "wandb": ["nothing", "[]"],
    **{group: ["nothing"] for group in ("seeds", "study")},  # an empty list of them means none
    **{f"+{place}key_of_nothing": ["1"] for place in ("", "dataset.", "model.", "norm.", "recipe.", "wandb.")},
    **{f"{place}key_of_nothing": ["1"] for place in ("", "dataset.", "model.", "norm.", "recipe.", "wandb.")},
    **{f"~{key}": [""] for key in ("seed", "recipe.epochs", "dataset.root", "model._target_", "norm._target_")},
}
CONTRADICTIONS = [
    ["dataset=folder"],
    ["dataset=folder", "dataset.path=''"],
    ["dataset=digits", "dataset.path=/images"],
    ["recipe=strong", "recipe.epochs=5"],
    ["recipe.schedule.warmup_epochs=2", "recipe.epochs=2"],
    ["devices=2", "recipe.batch_size=33"],
    ["devices=4", "recipe.batch_size=4"],
    ["norm=bn", "+norm.gate=full"],
    ["norm=bn", "norm.momentum=2"],
    ["norm=bn", "norm.eps=-1"],
    ["norm=iebn", "norm.momentum=-1"],
    ["norm=bn", "+norm.affine=maybe"],
    ["norm=bn", "+norm.device=7"],
    ["dataset=cifar10", "dataset.mean=null"],
    ["dataset.padding=8", "dataset.image_size=8"],
    ["seed=${nothing}"],
    ["name=${oc.env:NO_SUCH_VARIABLE}"],
    ["seed=${seed}"],
    ["seed=???"],
    ["seed"],
    ["=1"],
    ["seed=[1"],
    ["seed={a"],
    ["model=resnet18", "model.shortcut=none"],
    ["model=vgg_small", "model.width=-1"],
]
CASES = [[f"{key}={value}" if value or key[0] != "~" else key] for key, values in WRONG.items() for value in values]
CASES += CONTRADICTIONS
HELPS = re.compile(r"should|must|allowed|use |take|not a key|needs|choose|give|go together|is for|no memory")


def refusal(make: Make, overrides: list[str]) -> str | None:
    """Return what is wrong with the way in which a wrong configuration is refused, or None."""
    try:
        check_groups(overrides, REPOSITORY / "conf")  # as train.py does before Hydra begins
        make(*overrides, tiny=False)
    except ConfigError as error:
        text = str(error)
        if not HELPS.search(text):
            return f"{overrides}: does not say what is allowed: {text}"
        if len(text) > 500:
            return f"{overrides}: {len(text)} characters"
        return None
    except HYDRA_ERRORS as error:
        text = hydra_sentence(error, REPOSITORY / "conf")
        return None if 0 < len(text) <= 500 and "\n" not in text else f"{overrides}: {text!r}"
    except ValueError as error:  # of an override that Hydra does not expect: train.py prints it in a line
        return None if str(error) else f"{overrides}: says nothing"
    except Exception as error:
        return f"{overrides}: {type(error).__name__}: {error}"
    return f"{overrides}: not refused"


@pytest.mark.parametrize("share", range(4))
def test_every_wrong_value_is_refused_in_words(make_plan: Make, account: Account, share: int) -> None:
    cases = CASES if FULL else random.Random(0).sample(CASES, 48)
    assert len(CASES) > 400
    lost = [line for case in cases[share::4] if (line := refusal(make_plan, case)) is not None]
    account("bad input", "wrong names, types, ranges, contradictions (composed)", len(cases[share::4]), lost)


KEYS = sorted(key for key in WRONG if not key.startswith(("+", "~")) and key not in ("name", "results_dir"))
JUNK = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.integers() | st.booleans(), lambda some: st.lists(some, max_size=3), max_leaves=5).map(str),
)


@settings(
    max_examples=300 if FULL else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(key=st.sampled_from(KEYS), value=JUNK)
def test_no_value_at_all_ends_in_a_trace(make_plan: Make, key: str, value: str) -> None:
    """Whatever is typed, it is a plan or a refusal; and a plan stays below its own folder."""
    try:
        plan = make_plan(f"{key}={value}", tiny=False)
    except Exception as error:
        ours = isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
        if not ours and "/hydra/" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        if not str(error):
            raise
        return
    folder = Path(plan.config.results_dir).resolve()
    assert plan.directory.resolve().is_relative_to(folder)
    assert len(plan.directory.resolve().relative_to(folder).parts) == 6


FILES = {
    "no yaml": "a: [1\nb: }",
    "a tab": "eps:\t1\n\tmomentum: 1",
    "nothing": "",
    "a list": "- 1\n- 2\n",
    "a word": "abn",
    "an object": "!!python/object/apply:os.system ['touch X']",
    "two of a key": "eps: 1\neps: 2\n",
    "no target": "eps: 1.0e-5\n",
    "a hostile target": "_target_: os.system\ncommand: touch X\n",
    "a hostile target inside": "_target_: torch.nn.BatchNorm2d\neps: {_target_: os.system, command: touch X}\n",
    "no such default": "defaults: [nothing]\n",
    "bytes": "\x00\x01",
    "no partial": "_target_: torch.nn.BatchNorm2d\n",
    "nan": "_target_: torch.nn.BatchNorm2d\n_partial_: true\neps: .nan\n",
}


@pytest.mark.parametrize("kinds", [list(FILES)[i::2] for i in range(2)])
def test_every_broken_file_is_refused_in_words(cli: Cli, account: Account, tmp_path: Path, kinds: list[str]) -> None:
    (tmp_path / "conf" / "norm").mkdir(parents=True)
    lost = []
    for kind in kinds:
        (tmp_path / "conf" / "norm" / "mine.yaml").write_text(FILES[kind])
        done = cli.run(f"--config-dir={tmp_path / 'conf'}", "norm=mine", f"results_dir={tmp_path / 'results'}", *TINY)
        if complaint := complain(done.code, done.err, done.out, tmp_path):
            lost.append(f"{kind}: {complaint}")
    account("bad input", "broken and hostile configuration files", len(kinds), lost)


COMMANDS = [  # beside those of tests/training/test_run.py
    ["norm=../norm/abn"],
    ["name=../up"],
    ["dataset=0"],
    ["seed=${seed}"],
    ["sed=1"],
    ["norm.momentum=2"],
    ["norm._target_=os.system", "+norm.command=touch X"],
    ["dataset.train_images=3"],
    ["dataset.train_images=999999"],
    ["dataset.num_classes=7"],
    ["dataset.image_size=64"],
    ["-m", "seed=0,-1"],
    ["-m", "norm=bn,abm"],
    ["-m", "seed=range(0,)"],
    ["-m", "seed=0,1", "norm.eps=-1,1"],
    ["--no-such-flag"],
    ["seed=[1"],
    ["results_dir=/dev/null/x"],
    ["question=\udcff", "seed=-1"],
]


@pytest.mark.parametrize("share", range(2))
def test_a_wrong_command_line_ends_with_a_sentence(cli: Cli, account: Account, tmp_path: Path, share: int) -> None:
    lost = []
    commands = COMMANDS[share::2]
    for command in commands:
        base = [f"results_dir={tmp_path / 'results'}", *TINY]
        keys = {word.split("=")[0] for word in command}
        rest = [] if "dataset" in keys else [word for word in base if word.split("=")[0] not in keys]
        done = cli.run(*command, *rest)
        if complaint := complain(done.code, done.err, done.out, tmp_path):
            lost.append(f"{command}: {complaint}")
    account("bad input", "wrong command lines (real commands)", len(commands), lost)


def complain(code: int, err: str, out: str, folder: Path) -> str | None:
    if code in (0, None) or code < 0:
        return f"exit code {code}"
    if "Traceback" in err + out or 'File "' in err + out:
        return f"a trace: {err[-1500:]}"
    said = err.split("train.py: error:")[-1]  # after the usage, which argparse prints first
    if not said.strip() or len(said.splitlines()) > 6:
        return f"{len(err.splitlines())} lines: {err}"
    if list(itertools.chain(folder.rglob("last.ckpt"), folder.rglob("result.json"))):
        return "it was trained"
    if list(folder.rglob("X")) or (REPOSITORY / "X").exists():
        return "a command was executed"
    return None
