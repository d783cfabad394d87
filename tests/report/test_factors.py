"""What varies among the cells of a study, and against which level it is compared."""

from typing import Any

from abn_exp.report.comparisons import Cell
from abn_exp.report.factors import describe_group, find_factors


def factors_of(*rows: tuple[str, str, dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return {factor: levels} for (norm, variant, {key: value}) rows of one data set and network."""
    settings = {("digits", "binarynet", norm, variant): keys for norm, variant, keys in rows}
    return {factor.name: factor.levels for factor in find_factors(settings)}


def test_what_belongs_to_a_norm_or_to_nothing_is_no_factor() -> None:
    bn, abn = {"norm.gate": "none", "lr": 1}, {"norm.gate": "full", "lr": 1}
    assert factors_of(("bn", "fixed", bn), ("abn", "fixed", abn)) == {}


def test_a_rate_of_each_norm_s_own_is_a_factor_beside_others() -> None:
    """As a search for each norm gives: it varies between norms alone."""
    rates = {"bn": 1, "abn": 2}
    rows = [(norm, f"{w}-{lr}", {"lr": lr, "width": w}) for norm, lr in rates.items() for w in (3, 5)]
    assert factors_of(*rows) == {"lr": ("1", "2"), "width": ("3", "5")}
    recipes = [(norm, f"fixed-{lr}", {"recipe": "fixed", "lr": lr}) for norm, lr in rates.items()]
    assert factors_of(*recipes, ("bn", "paper", {"recipe": "paper", "lr": 1}))["lr"] == ("1", "2")


def test_that_other_norms_lack_an_option_is_no_level_to_compare_with() -> None:
    rows = [("bn", "fixed", {"lr": 1}), ("abn", "fixed", {"lr": 1, "norm.unbiased": True})]
    assert factors_of(*rows, ("abn", "fixed_u", {"lr": 1, "norm.unbiased": False})) == {
        "norm.unbiased": ("true", "absent", "false")
    }


def test_of_norms_with_levels_of_their_own_all_are_named() -> None:
    keys = {"bn": {"norm.m": 1}, "abn_paper": {"norm.m": 9}, "iebn": {}}
    other = {("digits", "binarynet", "bn", "fast"): {"norm.m": 2}}
    settings = {("digits", "binarynet", norm, "fixed"): one for norm, one in keys.items()} | other
    cells = [Cell(*key, (), {}, {}) for key in settings if key[3] == "fixed"]
    assert describe_group(cells, find_factors(settings)) == "digits with binarynet (norm.m 1 or 9)"
    assert describe_group(cells[2:], find_factors(settings)) == "digits with binarynet (norm.m absent)"


def test_of_many_factors_those_that_differ_from_the_reference_are_named() -> None:
    usual = {"lr": 1, "epochs": 2, "width": 3, "decay": 4}
    changed: list[dict[str, int]] = [{}, *({key: 9} for key in usual)]
    settings = {("digits", "binarynet", "bn", f"v{i}"): usual | change for i, change in enumerate(changed)}
    found, cells = find_factors(settings), [Cell(*key, (), {}, {}) for key in settings]
    assert describe_group(cells[:1], found) == "digits with binarynet (every factor at its reference)"
    assert describe_group(cells[2:3], found) == "digits with binarynet (epochs 9)"
    settings.popitem()
    found = find_factors(settings)
    assert describe_group(cells[:1], found) == "digits with binarynet (epochs 2, lr 1, width 3)"


def test_groups_of_different_norms_never_share_a_description() -> None:
    rows = [("bn", "one", {"norm.eps": 1}), ("iebn", "two", {"norm.eps": 1})]
    gates = [("abn", variant, {"norm.eps": 1, "norm.gate": gate}) for variant, gate in (("two", "a"), ("three", "b"))]
    assert factors_of(*rows, *gates) == {"variant": ("two", "one", "three")}


def test_keys_that_follow_from_the_recipe_are_the_recipe() -> None:
    fixed = {"recipe": "fixed", "lr": 0.1, "epochs": 200, "split": 0.1}
    paper = {"recipe": "paper", "lr": 0.2, "epochs": 200, "split": 0}
    strong = {"recipe": "strong", "lr": 0.3, "epochs": 400, "split": 0.1}
    rows = [("bn", "fixed", fixed), ("bn", "paper", paper), ("bn", "strong", strong)]
    assert factors_of(*rows) == {"recipe": ("fixed", "paper", "strong")}
    crossed = [("bn", f"{row[1]}_lr-5", {**row[2], "lr": 5}) for row in rows]
    assert factors_of(*rows, *crossed) == {"recipe": ("fixed", "paper", "strong"), "lr": ("5", "0.1", "0.2", "0.3")}


def test_keys_that_vary_together_are_one_factor_and_crossed_ones_two() -> None:
    rows = [("bn", f"{a:02}-{b:d}", {"recipe.a": a, "recipe.b": -a, "c": b}) for a in (2, 10) for b in (False, True)]
    assert factors_of(*rows) == {"a, b": ("2, -2", "10, -10"), "c": ("false", "true")}


def test_reference_level_is_the_most_common_then_the_one_of_fewest_overrides() -> None:
    default = [("bn", "fixed", {"m": 0.9}), ("bn", "fixed_m-0.1", {"m": 0.1})]
    assert factors_of(*default)["m"] == ("0.9", "0.1")
    assert factors_of(*default, ("abn", "fixed_m-0.1", {"m": 0.1}))["m"] == ("0.1", "0.9")


def test_fp32_is_what_other_precisions_are_compared_with() -> None:
    rows = [(norm, f"fixed_precision-{p}", {"precision": p}) for norm in ("bn", "abn") for p in ("bf16", "fp32")]
    most = [("iebn", "fixed_precision-bf16", {"precision": "bf16"})]
    assert factors_of(*rows, *most)["precision"] == ("fp32", "bf16")


def test_fixed_is_what_other_recipes_are_compared_with() -> None:
    rows = [(norm, recipe, {"recipe": recipe}) for norm in ("bn", "abn") for recipe in ("paper", "fixed")]
    assert factors_of(*rows, ("iebn", "paper", {"recipe": "paper"}))["recipe"] == ("fixed", "paper")


def test_variants_that_no_key_tells_apart_go_by_their_names() -> None:
    assert factors_of(("bn", "one", {}), ("bn", "other", {})) == {"variant": ("one", "other")}
