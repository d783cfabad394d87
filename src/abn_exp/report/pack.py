"""Pack a folder of runs into `quoted/`: its report, its analyses, and all its records in one file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from abn_exp.records import (
    COMMAND,
    LOOKS,
    NETWORK,
    NETWORKS,
    RECORDS,
    RUN_FILES,
    STUDY_FILES,
    read_command,
    read_records,
    read_run_file,
    read_study_file,
    unite_looks,
    write_records,
)
from abn_exp.report.build import write_report
from abn_exp.results import find_runs
from abn_exp.trained_network import pack_network, read_config

ANALYSIS_FILES = (".csv", ".md", ".png")
OWN_TABLES = ("channels.csv", "histograms.csv")  # of an analysis: large, and summarised by its other tables


@dataclass(frozen=True)
class Packed:
    """What `pack` did: where to, how many runs were added and were there before, and which were left out."""

    folder: Path
    added: int
    present: int
    left_out: list[str]  # a sentence each


def pack(folder: Path, *, networks: bool = False) -> Packed:
    """Write the runs, the report and the analyses of `folder`, results/NAME, into results/quoted/NAME, or add them.

    Runs that came to an end, with a result or with a reason, are packed; others are left out, but for their
    configurations where there is a primary comparison, which is not to be judged without them. With `networks`, so
    are the trained networks of those whose weights are here, into a file of their own.

    Raises ValueError, and changes nothing, where a run is damaged, where there is none to pack, or where the archive
    holds the same run with other contents.
    """
    folder = folder.resolve()
    if folder.parent.name == "quoted":
        raise ValueError(f"{folder} is packed already; give results/NAME.")
    target = folder.parent / "quoted" / folder.name
    archive = target / RECORDS
    files = dict(read_records(archive)) if archive.is_file() else {}
    packed = {name.rpartition("/")[0] for name in files if name.endswith(("/result.json", "/FAILED"))}
    # Of runs that had not ended, which may be gone since.
    files = {name: data for name, data in files.items() if "/" not in name or name.rpartition("/")[0] in packed}
    there = archive.is_file() and (target / NETWORKS).is_file()  # networks without records may be of other runs
    trained_before = read_records(target / NETWORKS) if there else {}
    trained = dict(trained_before)
    added, present, left_out = 0, 0, []
    without: list[Path] = []
    for run in find_runs(folder):
        name = run.directory.relative_to(folder).as_posix()
        if name.count("/") != 4:
            raise ValueError(f"{folder} is not the folder of one study; give results/NAME.")
        if run.status == "damaged":
            raise ValueError(f"{run.reason}; nothing was packed.")
        if run.status == "unfinished":
            left_out.append(f"{run.directory} is left out: it is not finished.")
            config = read_run_file(run.directory, "config.yaml")
            if config is not None and read_config(run.directory).get("primary") is not None and name not in packed:
                files[f"{name}/config.yaml"] = config
            continue
        if networks and run.status == "finished" and f"{name}/{NETWORK}" not in trained:
            try:
                trained[f"{name}/{NETWORK}"] = pack_network(run)
            except FileNotFoundError:
                without.append(run.directory)
        contents = {file: data for file in RUN_FILES if (data := read_run_file(run.directory, file)) is not None}
        if name not in packed:
            files |= {f"{name}/{file}": data for file, data in contents.items()}
            added += 1
            continue
        # train.log is not compared: it grows whenever a finished run is asked for again.
        compared = [file for file in RUN_FILES if file not in ("train.log", "wandb-run-id")]
        if different := [file for file in compared if contents.get(file) != files.get(f"{name}/{file}")]:
            raise ValueError(
                f"{archive} holds {name} with another {different[0]} than {folder}; nothing was packed. Pack it "
                "under another name, or remove the archive to replace all of it."
            )
        present += 1
    if without:
        networks_of = f"{without[0]}" + (f" and {len(without) - 1} more" if len(without) > 1 else "")
        left_out.append(f"Without a network, as their weights are not here: {networks_of}.")
    if not added + present:
        raise ValueError(f"There are no finished runs below {folder}; give a folder that train.py wrote.")
    commands = dict.fromkeys((read_command(target) + read_command(folder)).splitlines())
    files[COMMAND] = "".join(f"{line}\n" for line in commands).encode()
    for name in STUDY_FILES:
        if name != COMMAND and (content := read_study_file(folder, name)) is not None:
            files[name] = content if name != LOOKS else unite_looks(folder / LOOKS, files.get(name), content)
    target.mkdir(parents=True, exist_ok=True)
    if not there:
        (target / NETWORKS).unlink(missing_ok=True)
    if not archive.is_file() or read_records(archive) != files:
        write_records(archive, files)
    if trained != trained_before:
        write_records(target / NETWORKS, trained)
    _copy_analyses(folder / "analysis", target / "analysis")
    write_report(target)
    return Packed(target, added, present, left_out)


def _copy_analyses(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.suffix in ANALYSIS_FILES and path.name not in OWN_TABLES:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
