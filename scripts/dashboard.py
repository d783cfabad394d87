#!/usr/bin/env python
"""Build the W&B workspace of a study: cells side by side, seeds as bands.

    python scripts/dashboard.py --entity TEAM --name STUDY      saves it and prints its address
    python scripts/dashboard.py --name STUDY --dry-run          prints it as JSON; needs neither key nor network

Needs pip install --editable ".[dashboard]", and to save it `wandb login`.
"""

import argparse
import json
import os
import sys
from typing import Any

from abn_exp.errors import in_a_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    project, team = os.environ.get("WANDB_PROJECT") or "abn_exp", os.environ.get("WANDB_ENTITY") or None
    parser.add_argument("--project", default=project, help="the W&B project (default: %(default)s)")
    parser.add_argument("--entity", default=team, help="the user or team it belongs to (default: that of the key)")
    parser.add_argument("--name", help="show only the runs of this study, train.py's name= (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON and save nothing")
    arguments = parser.parse_args()
    try:
        from wandb_workspaces import workspaces
    except ImportError:
        sys.exit('error: a dashboard needs wandb-workspaces: pip install --editable ".[dashboard]".')
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    entity = arguments.entity
    filters = [workspaces.Metric("JobType") == "train"]
    if arguments.name is not None:
        filters.append(workspaces.Config("study") == arguments.name)
    try:
        if not arguments.dry_run:
            if not wandb.login(prompt=False, verify=False):
                sys.exit("error: no W&B key: run `wandb login`, or look at the workspace with --dry-run.")
            entity = entity if entity is not None else wandb.Api(timeout=30).default_entity
        workspace = workspaces.Workspace(
            entity=entity if entity is not None else "ENTITY",
            project=arguments.project,
            name=f"{arguments.name} by norm" if arguments.name is not None else "Norms",
            sections=sections(),
            settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=100),
            runset_settings=workspaces.RunsetSettings(filters=filters),
        )
        if arguments.dry_run:
            print(json.dumps(json.loads(workspace._to_model().model_dump_json()), indent=2))
        else:
            print(workspace.save().url)
    except Exception as error:  # wandb's own errors have no class in common
        sys.exit(f"error: W&B: {in_a_line(error) or type(error).__name__}")


def sections() -> list[Any]:
    """Return the workspace's sections: a cell, which is W&B's group, is a line or a bar, with the standard deviation
    over its seeds."""
    from wandb_workspaces.reports import v2 as panels
    from wandb_workspaces.workspaces import Section

    group: dict[str, Any] = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def curve(title: str, *metrics: str, **options: Any) -> panels.LinePlot:
        return panels.LinePlot(title=title, x="epoch", y=list(metrics), **group, **options)

    accuracy = panels.SummaryMetric("final/test_acc")
    return [
        Section(
            "Accuracy",
            is_open=True,
            panels=[
                curve("Validation accuracy", "val/acc"),
                curve("Training loss", "train/loss"),
                panels.BarPlot(title="Test accuracy, mean and standard deviation", metrics=[accuracy], **group),
                panels.ScatterPlot(title="Test accuracy, seed by seed", x=panels.Config("seed"), y=accuracy),
            ],
        ),
        Section(
            "Binary weights",
            is_open=True,
            panels=[
                curve("Share of signs that flip in an epoch", metric_regex="bnn/flip_ratio/.*"),
                curve("Share of latent weights beyond one", metric_regex="bnn/latent_beyond_one/.*"),
            ],
        ),
        Section("Speed", panels=[curve("Images per second", "images_per_second")]),
    ]


if __name__ == "__main__":
    main()
