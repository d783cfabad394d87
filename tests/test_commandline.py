"""Words of a command in any order; Hydra's own errors in a sentence that names what is allowed."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from abn_exp.commandline import check_groups, hydra_sentence, overrides_last
from tests.helpers.runs import REPOSITORY

CONF = REPOSITORY / "conf"


@pytest.mark.parametrize(
    ("typed", "ordered"),
    [
        ("norm=bn,abn -m seeds=five", "-m norm=bn,abn seeds=five"),
        ("-m norm=bn seed=0", "-m norm=bn seed=0"),
        ("seed=1 --cfg job ~norm --package recipe", "--cfg job --package recipe seed=1 ~norm"),
        ("a=1 --config-dir x=y b=2", "--config-dir x=y a=1 b=2"),
        ("a=1 --config-dir=x=y b=2 --multirun c=3", "--config-dir=x=y --multirun a=1 b=2 c=3"),
        (
            "norm=bn --resolve model=vgg_small --cfg job recipe=short",
            "--resolve --cfg job norm=bn model=vgg_small recipe=short",
        ),
        ("", ""),
    ],
)
def test_overrides_may_stand_before_options(typed: str, ordered: str) -> None:
    assert overrides_last(typed.split()) == ordered.split()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("nrom=bn", "nrom is not a key of the configuration; did you mean norm?"),
        ("epochs=5", "epochs is not a key of the configuration; did you mean recipe.epochs?"),
        ("norm.momentun=1", "norm.momentun is not a key of the configuration; did you mean norm.momentum?"),
        ("norm.dropout=1", "is added by +norm.dropout=VALUE."),
        ("xyzzy=1", "xyzzy is not a key of the configuration; `python train.py --cfg job` lists them all."),
        ("norm=bm", "norm=bm is not allowed: it should be abn, abn_backward,"),
        ("model=binarnet", "; did you mean binarynet?"),
        ("norm=bn,abn", "norm=bn,abn has several values: add -m to train each."),
        ("seed=3,4", "seed=3,4 has several values: add -m to train each, or write a list as 'seed=[3,4]'."),
        ("norm=", "norm= is not allowed: it should be abn, abn_backward,"),
        ("hydra/launcher=slurm", 'hydra/launcher=slurm needs a plug-in: pip install --editable ".[slurm]".'),
        ("hydra/launcher=ray_local", 'pip install --editable ".[ray]".'),
        ("hydra.mode=FOO", "expected one of [RUN, MULTIRUN]"),
        ("norm", "norm is not allowed: an option is written KEY=VALUE, without blanks."),
        ('name=a"b', 'name=a"b has a character that needs quotes.'),
        (
            "dataset.path=~/images",
            "dataset.path=~/images has a character that needs quotes: 'dataset.path=\"~/images\"'.",
        ),
    ],
)
@pytest.mark.parametrize("at_work", [False, True], ids=["alone", "inside Hydra"])
def test_a_wrong_word_is_told_in_a_sentence(override: str, sentence: str, at_work: bool) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        with pytest.raises(HydraException) as caught:
            compose("config", [override], return_hydra_config=True)
        if at_work:
            text = hydra_sentence(caught.value)
    if not at_work:
        text = hydra_sentence(caught.value, CONF)
    assert sentence in text
    assert "\n" not in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("norm=[bn,abn]", r"norm=\[bn,abn\] is not allowed: .* bn, .*; -m norm=bn,abn trains each\.$"),
        ("seeds=[3,4]", r"seeds=\[3,4\] is not allowed: .* five, .*; -m seed=3,4 trains each\.$"),
        ("dataset=digits norm=[3,4]", r"norm=\[3,4\] is not allowed: .* iebn\.$"),
        ("-m seeds=null", r"seeds=null is not allowed: .* until_decided\.$"),
        ("norm=5", "norm=5 is not allowed"),
        ("-m seeds=five,ten", "seeds=five,ten is not allowed: choose one list of seeds, or seed=0,1,2."),
    ],
)
def test_a_group_takes_the_name_of_one_file(command: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_groups(command.split(), CONF)


def test_what_names_a_file_of_a_group_is_left_to_hydra() -> None:
    check_groups(["-m", "norm=bn,abn", "seed=3", "seeds=five", "recipe.optimizer.betas=[0.9,0.99]", "~wandb"], CONF)
    check_groups(["--config-dir", "norm=[bn]", "dataset=my_own", "hydra/launcher=basic", "looks=[2,4]"], CONF)
