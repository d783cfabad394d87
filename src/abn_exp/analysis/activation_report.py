"""The report on the binary activations of trained networks, norm beside norm."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from abn_exp.analysis import pictures
from abn_exp.analysis.activations import (
    BANDS,
    EDGES,
    GRID,
    Distribution,
    NetworkActivations,
    analyze,
    check_places,
    drawn_part,
)
from abn_exp.analysis.outcome import of_networks, slopes
from abn_exp.analysis.summary import (
    DIGITS,
    AnalysisWriter,
    Contrast,
    check_pairs,
    contrast,
    contrast_rows,
    contrast_table,
    counts_text,
    group_names,
    group_title,
    mean_text,
    means_table,
)
from abn_exp.analysis.trained import Measured, Opener, TestImages, measure_each
from abn_exp.config import parse
from abn_exp.models.build import get_object_or_explain
from abn_exp.report.comparisons import Cell, collect_cells, group_cells
from abn_exp.report.formatting import interval_text, markdown_list, number_text
from abn_exp.report.stats import Array
from abn_exp.results import Run, read_metrics
from abn_exp.trained_network import read_config

CHANNEL, LAYER = "channel imbalance", "layer imbalance"
TWO, BEYOND = "share of channels with two thresholds", "share of inputs beyond one threshold"
MEASURES = {
    "imbalance_of_channels": CHANNEL,
    "imbalance_of_layer": LAYER,
    "entropy_of_channels": "entropy (bits)",
    "p_plus": "P(+1)",
    "constant_channels": "constant",
}
NOTES = """\
- P(+1) is the share of +1 among the binarized inputs of a binary layer, over the test set. Imbalance is
  |2 P(+1) - 1|, 0 for a fair coin and 1 for a constant. Channel imbalance is each channel's, averaged; layer
  imbalance is that of all values of a layer together, so that channels that lean to opposite sides cancel. Entropy,
  -P log2 P - (1 - P) log2(1 - P), is each channel's, averaged.
- Only layers whose input comes from a norm on feature maps count here; those behind the head's own norms, the same in
  every network, are in layers.csv. A layer that binarizes what another one does (a shortcut) counts once.
- "Constant" is the share of channels that have the same sign at every place of every test image.
- A response is a norm's output for a standardised input, from its learned parameters. Where a sign follows, with or
  without a Hardtanh between, it is +1 where the response is not negative. In a network whose shortcuts are added in
  between, the sign sees the sum, and the response is one part of it. Responses and shares of signs are drawn from -4
  to 4, and as far beyond as there are thresholds, at most to -16 and 16.
- A gated norm, SiLU(xhat) + beta, gives a sign one threshold where beta <= 0, two where 0 < beta < 0.278, none
  above: +1 always. With a scale behind the gate, beta / gamma takes beta's place, and a negative gamma swaps the
  signs; with one inside it, beta alone decides. Norms without a gate in the forward pass have one threshold.
- "Beyond one threshold" is the share of standard normal inputs whose sign no single threshold on the channel's input
  could give: how much the second threshold of a norm is used. 0 where a response is monotone.
- Accuracy and imbalance: from norm to norm, a least-squares line through the networks of one seed, one a norm, and
  the mean of these slopes over seeds; from seed to seed, one slope through all networks, each less the mean of its
  norm, which takes all of them as independent, though those of one seed share initial weights and batches. Neither
  says that one is the other's cause. Norms, of which it takes three at least, differ in other things, too. Holm's
  correction is over these slopes.
- Flip ratio: the share of a layer's binary weights whose sign changed during an epoch.
- Means are over layers, then over seeds, with Student's 95 % interval over seeds; differences are paired by seed. A
  verdict asks for p < 0.05 after Holm's correction over all judged differences. "Undecided" is no evidence that
  norms are equal."""


def _check_norm(run: Run) -> None:
    """Refuse a norm of which nothing could be said: one that holds a BatchNorm2d would be taken for it alone. Raises
    ValueError."""
    norm = parse(read_config(run.directory)).norm
    made = get_object_or_explain(norm, "norm")
    if not (isinstance(made, type) and issubclass(made, nn.BatchNorm2d)):
        raise ValueError(
            "This analysis is of what BatchNorm2d, or a class derived from it, gives to a binary layer; "
            f"{norm['_target_']}, the norm of {run.directory}, is neither."
        )


def write(runs: Sequence[Run], opener: Opener, out: Path, command: str, *, reference: str = "bn") -> AnalysisWriter:
    """Analyse the runs' networks and write summary.md, layers.csv, channels.csv, ... and figures into `out`."""
    cells = collect_cells(runs, reference)
    check_pairs(cells, reference)
    report = AnalysisWriter(out, f"Binary activations: {runs[0].directory.parents[4].name}", command, runs)
    for run in runs:
        _check_norm(run)
    opener.check(runs, check_places)
    measured = measure_each(runs, opener, _measure, out / "parts", "activations 3")
    found = {directory: NetworkActivations.from_plain(plain) for directory, plain in measured.items()}
    scores = {
        run: {MEASURES[k]: v for k, v in each.scores().items() if k in MEASURES} | _additional(each)
        for run, each in found.items()
    }

    counts = {run.dataset: found[run.directory].images for run in runs}
    report.parts.append(
        "Does ABN give a more imbalanced activation distribution, and additional activation-like functions "
        f"(claim C5)? Measured on {counts_text(counts)} test images a network."
    )
    # Where no channel of the reference has a second threshold, as with BN, there is nothing to test.
    none = all(scores[run.directory][TWO] == 0 for cell in cells if cell.norm == reference for run in cell.runs)
    contrasts = contrast(cells, scores, [CHANNEL, LAYER, *([] if none else [TWO, BEYOND])], reference)
    described = contrast(cells, scores, [TWO, BEYOND], reference) if none else []
    imbalances = [c for c in contrasts if c.measure in (CHANNEL, LAYER)]
    report.verdicts(f"Is the imbalance above {reference}'s?", imbalances, cells, reference)
    additional = [c for c in contrasts if c not in imbalances]
    question = "Are there additional activation functions, and are they used?"
    if additional:
        report.verdicts(question, additional, [], reference)
    if described:  # and not judged
        sentences = [_described(c) for c in described]
        report.sentences += sentences
        report.parts += [f"## {question}", markdown_list(sentences)]
    measures = list(MEASURES.values())
    report.table("means", "Means over layers", means_table(cells, scores, measures))
    report.table("differences", f"Differences to {reference}", contrast_table(contrasts))
    outcome = slopes(cells, scores, CHANNEL)
    if outcome:
        report.sentences += [f"{slope.verdict.capitalize()}. {slope.sentence}" for slope in outcome]
        lines = [f"**{slope.verdict}**: {slope.sentence}" for slope in outcome]
        report.parts += ["## Does test accuracy go with the imbalance? (exploratory)", markdown_list(lines)]
    layered: list[Contrast] = []
    for group, members in group_cells(cells).items():
        where, name = group_title(cells, group), group_names(cells)[group]
        by_norm = {cell.norm: [found[run.directory] for run in cell.runs] for cell in members}
        layers = [layer.name for layer in next(iter(by_norm.values()))[0].layers()]
        table = _layer_table(by_norm, layers)
        report.table(f"layers_{name}", f"Layer by layer, {where}", table)
        report.table(f"thresholds_{name}", f"Thresholds, {where}", _norm_table(by_norm))
        by_layer = {
            run.directory: {
                layer.name: layer.scores()["imbalance_of_channels"] for layer in found[run.directory].layers()
            }
            for cell in members
            for run in cell.runs
        }
        layered += contrast(members, by_layer, layers, reference)
        _draw(report, members, by_norm, layers, where, name)
        points = {n: np.array(list(each.values())) for n, each in of_networks(members, scores, CHANNEL).items()}
        title = "Test accuracy and imbalance of channels"
        figure = pictures.scatter({where: points}, title, "|2 P(+1) - 1|, mean over layers", "Test accuracy (%)")
        report.figure(f"outcome_{name}", figure, f"{title}, {where}")
    report.csv("comparison", contrast_rows(contrasts, judged=True) + contrast_rows(described, judged=False))
    report.csv("comparison_layers", contrast_rows(layered, judged=False))
    report.csv("outcome", [slope.row() for slope in outcome])
    places = list(_places(cells, found))
    report.csv("layers", [row | {"channels": x.channels} | x.scores() for row, x in places])
    channels = ((row, enumerate(x.p_plus.tolist())) for row, x in places)
    report.csv("channels", [row | {"channel": i, "p_plus": p} for row, each in channels for i, p in each])
    report.csv("histograms", [row | bin_ for row, x in places for bin_ in _bins(x)])
    report.parts.append("## Is it the trained network?\n\n" + _accuracies(cells, found))
    report.finish(NOTES, opener.measured_on)
    report.show("means")
    return report


def _described(c: Contrast) -> str:
    return (
        f"On {c.where}, {c.measure} is {number_text(c.own, DIGITS)} with {c.norm} (95 % interval "
        f"{interval_text(c.paired.interval, DIGITS)}, n = {c.paired.n[0]} seeds). With {c.reference} it is 0: "
        "each sign behind it has at most one threshold."
    )


def _measure(network: nn.Module, images: TestImages) -> Measured:
    return asdict(analyze(network, images.normalized, images.labels))


def _additional(network: NetworkActivations) -> dict[str, float]:
    """Return how many channels have a second threshold, and how many inputs it decides about; means over layers."""
    norms = network.norms.values()
    two = [np.nan if norm.bands is None else norm.bands["two thresholds"] for norm in norms]
    return {TWO: float(np.mean(two)), BEYOND: float(np.mean([norm.beyond for norm in norms]))}


def _each(by_norm: dict[str, list[NetworkActivations]], value: Callable[[Distribution], float]) -> dict[str, Array]:
    """Return value(layer) as (num_seeds, num_layers) by norm."""
    return {norm: np.array([[value(x) for x in each.layers()] for each in all_]) for norm, all_ in by_norm.items()}


def _layer_table(
    by_norm: dict[str, list[NetworkActivations]], layers: list[str]
) -> tuple[list[str], list[list[str]]]:
    columns = {text: _each(by_norm, lambda x, key=key: x.scores()[key]) for key, text in MEASURES.items()}  # type: ignore[misc]
    rows = [
        [layer, norm, *(mean_text(column[norm][:, i]) for column in columns.values())]
        for i, layer in enumerate(layers)
        for norm in by_norm
    ]
    return ["input of", "norm", *columns], rows


def _norm_table(by_norm: dict[str, list[NetworkActivations]]) -> tuple[list[str], list[list[str]]]:
    """Shares of each norm layer's channels by how many thresholds a sign behind it has."""
    rows = []
    for layer in next(iter(by_norm.values()))[0].norms:
        for norm, seeds in by_norm.items():
            each = [network.norms[layer] for network in seeds]
            shares = [[np.nan if x.bands is None else x.bands[band] for x in each] for band in BANDS]
            values = [*shares, [x.beyond for x in each], [x.beta for x in each]]
            rows.append([layer, norm, *map(mean_text, values)])
    return ["norm layer", "norm", *BANDS, "beyond one threshold", "mean beta"], rows


def _draw(
    report: AnalysisWriter,
    members: Sequence[Cell],
    by_norm: dict[str, list[NetworkActivations]],
    layers: list[str],
    where: str,
    name: str,
) -> None:
    """Draw one group's figures."""
    first = next(iter(by_norm.values()))[0]
    norms = [x.name for x in first.layers("norm output")]

    def of_norms(value: Callable[[NetworkActivations, int], Array]) -> dict[str, dict[str, Array]]:
        """value(network, i) of the i-th norm layer, by layer and norm, (num_seeds, ...)."""
        return {
            layer: {norm: np.array([value(each, i) for each in seeds]) for norm, seeds in by_norm.items()}
            for i, layer in enumerate(norms)
        }

    def add(kind: str, figure: Figure, caption: str) -> None:
        report.figure(f"{kind}_{name}", figure, f"{caption}, {where}")

    title = "Imbalance of channels"
    per_layer = _each(by_norm, lambda x: x.scores()["imbalance_of_channels"])
    add("imbalance", pictures.layer_means({where: per_layer}, layers, title, "|2 P(+1) - 1|"), title)

    channels = {
        layer: {norm: np.concatenate([each.layers()[i].p_plus for each in seeds]) for norm, seeds in by_norm.items()}
        for i, layer in enumerate(layers)
    }
    title = "P(+1) of the channels at the input of each binary layer, all seeds"
    add("channels", pictures.channel_spread(channels, "P(+1)", title), title)

    values = of_norms(lambda each, i: _density(each.layers("norm output")[i]))
    middles = EDGES.reshape(-1)[2:-1:4]
    title = "Norm outputs on the test set"
    add("values", pictures.curves(values, middles, title, "Value", "Density"), title)

    shown = {
        layer: {norm: seeds[0].norms[layer].responses.numpy() for norm, seeds in by_norm.items()}
        for layer in norms[:6]
    }
    title = "Learned responses of seven channels, first seed: solid where the sign is +1"
    part = drawn_part([y >= 0 for by_norm in shown.values() for y in by_norm.values()])
    cut = {layer: {norm: y[:, part] for norm, y in by_norm.items()} for layer, by_norm in shown.items()}
    add("responses", pictures.responses(cut, GRID[part], title), title)

    part = drawn_part(
        [each.norms[norm].signs.numpy() for seeds in by_norm.values() for each in seeds for norm in norms]
    )
    signs = of_norms(lambda each, i: each.norms[norms[i]].signs.numpy()[part])
    title = "Share of channels whose sign is +1"
    figure = pictures.curves(
        signs, GRID[part], title, "Standardised input", "Share of channels", limits=(-0.05, 1.05)
    )
    add("signs", figure, title)

    shares = {
        norm: np.array([[np.mean([(n.norms[x].bands or {})[band] for n in seeds]) for x in norms] for band in BANDS])
        for norm, seeds in by_norm.items()
        if seeds[0].norms[norms[0]].bands is not None
    }
    if shares := {norm: share for norm, share in shares.items() if share[1:].any()}:
        title = "Thresholds of a sign behind the norm, mean over seeds"
        add("thresholds", pictures.bands(shares, norms, BANDS, title), title)

    flips = _flips(members)
    longest = max((ratio.shape[1] for norms in flips.values() for ratio in norms.values()), default=0)
    if longest:
        title = "Signs of weights that change in an epoch"
        x = np.arange(1, longest + 1)
        add("flips", pictures.curves(flips, x, title, "Epoch", "Flip ratio", log=True, whole=True), title)


def _density(place: Distribution) -> Array:
    """Density in bins four times as wide, since a norm has few values behind integer sums."""
    shares = place.histogram.double().numpy().reshape(-1, 4).sum(1)
    return shares / shares.sum() / (4 * (EDGES[1] - EDGES[0]))


def _flips(members: Sequence[Cell]) -> dict[str, dict[str, Array]]:
    """Return each layer's flip ratios, (num_seeds, num_epochs) by norm, over the epochs that all runs have."""
    prefix = "bnn/flip_ratio/"
    panels: dict[str, dict[str, Array]] = {}
    for cell in members:
        lines = [read_metrics(run.directory) for run in cell.runs]
        epochs = min(map(len, lines))
        for key in lines[0][0] if epochs else ():
            if key.startswith(prefix):
                values = np.array([[line[key] for line in one[:epochs]] for one in lines])
                panels.setdefault(key.removeprefix(prefix), {})[cell.norm] = values
    return panels


def _places(
    cells: Sequence[Cell], found: dict[Path, NetworkActivations]
) -> Iterator[tuple[dict[str, object], Distribution]]:
    """Yield each place of each network, after the columns that say which it is."""
    for cell in cells:
        for run in cell.runs:
            for place in found[run.directory].places:
                where = {"seed": run.seed, "place": place.name, "kind": place.kind}
                yield cell.columns | where | {"from_feature_map_norm": place.feature_map}, place


def _bins(place: Distribution) -> list[dict[str, object]]:
    bins = zip(EDGES[:-1].tolist(), EDGES[1:].tolist(), place.histogram.tolist(), strict=True)
    return [{"low": low, "high": high, "count": count} for low, high, count in bins if count]


def _accuracies(cells: Sequence[Cell], found: dict[Path, NetworkActivations]) -> str:
    """Say how far the accuracies found here are from the recorded ones; on all test images they are the same."""
    pairs = [(found[run.directory].accuracy, run.result.test_acc) for c in cells for run in c.runs if run.result]
    worst = max(abs(a - b) for a, b in pairs)
    return (
        f"Accuracies on these images differ from the recorded test accuracies by at most {100 * worst:.2f} points "
        "(on the whole test set by rounding alone)."
    )
