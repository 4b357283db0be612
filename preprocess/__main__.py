"""`python -m preprocess COMMAND`: the command line of stage 1."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from preprocess.config import PreprocessConfig
from preprocess.download import download_dataset, open_anywhere
from preprocess.inspect import describe_pack, find_sample, pack_record
from preprocess.report.budget import budget_lines
from preprocess.report.stats import print_report
from preprocess.verify import verify_dataset
from shared.config import load_config
from shared.dataset import DataSet
from shared.errors import UserError, closest
from shared.files import read_json
from shared.remote import StoreError, as_path, is_remote

# What a command needs beyond this is imported by it: reading a report takes no torch, no Ray and no tokenizer.

USAGE = """usage: python -m preprocess COMMAND ...

  run    CONFIG.toml [--key value ...]   scan, plan, pack, report; goes on where it was stopped
  scan   CONFIG.toml [--key value ...]   headers and token counts -> index/
  plan   CONFIG.toml [--key value ...]   index -> plan/ (--explain: why this budget; --what-if: what N and L would fill,
                                         nothing is written)
  pack   CONFIG.toml [--key value ...]   plan -> shards/, dataset.json
  report DATASET                         the statistics of a finished data set
  verify DATASET                         prove every pack of a finished data set
  inspect DATASET --pack 3               what is in a pack, and where its bytes lie (--split validation)
  inspect DATASET --sample KEY           where a sample went, or why it was rejected (--source NAME)
  download URI DIRECTORY                 a finished data set from a store, checked; goes on where it stopped
  fetch  CONFIG.toml [--key value ...]   tables of URLs -> tars or documents that `run` reads (--shard 3/16: a slice)
  synthesize DIRECTORY [--key value ...] a small captioned data set of shapes, and its tokenizer

--json anywhere prints one JSON object for scripts. Keys are those of the TOML file, dotted: --budget.S 4096
"""


def main(arguments: list[str]) -> int:
    """Run one command; the exit code: 0 done, 1 faults found, 2 a mistake that the message says how to mend."""
    commands: dict[str, Callable[[list[str], bool], int]] = {
        "run": _run,
        "scan": _scan,
        "plan": _plan,
        "pack": _pack,
        "report": _report,
        "verify": _verify,
        "inspect": _inspect,
        "download": _download,
        "fetch": _fetch,
        "synthesize": _synthesize,
    }
    as_json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    try:
        if words[0] not in commands:
            raise UserError(f"unknown command {words[0]!r}; {closest(words[0], commands)}")
        return commands[words[0]](words[1:], as_json)
    except UserError as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(
            f"preprocess: {error.filename}: {error.strerror}; try again when the store answers",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("preprocess: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions:
    """What to show: a pack of a split, or every pack that holds a part of a sample."""

    pack: int = 0
    split: str = "train"
    sample: str = ""
    source: str = ""


def _config(words: list[str]) -> PreprocessConfig:
    if not words or words[0].startswith("--"):
        raise UserError("the first argument is the config, a TOML file; see configs/preprocess/")
    return load_config(PreprocessConfig, Path(words[0]), words[1:])


def _dataset(words: list[str]) -> Path:
    if len(words) != 1:
        raise UserError(f"expected one argument, the data set's directory; got {len(words)}")
    return as_path(words[0])


def _run(words: list[str], as_json: bool) -> int:
    from preprocess.job import run_job

    config = _config(words)
    stats = run_job(config)
    if as_json:
        print(json.dumps({"dataset": config.output, **stats}))
    else:
        print_report(stats, Console())
        print(f"data set {config.output}, report {config.output}/report/report.txt")
    return 0


def _scan(words: list[str], as_json: bool) -> int:
    from preprocess.job import open_executor, open_job

    config = _config(words)
    with open_job(config) as job, open_executor(config) as executor:
        job.scan(executor)
    _say({"index": f"{config.output}/index", "units": len(job.units)}, as_json)
    return 0


def _plan(words: list[str], as_json: bool) -> int:
    from preprocess.job import Job, open_executor, open_job

    flags = {flag for flag in ("--explain", "--what-if") if flag in words}
    config = _config([word for word in words if word not in flags])
    if "--what-if" in flags:
        record = Job(config).what_if().record
        print(json.dumps(record) if as_json else "\n".join(budget_lines(record, explain=True)))
        return 0
    with open_job(config) as job:
        job.require_index()
        # Before the plan: where nothing was chosen, that is said before the work.
        choice = job.budget_choice() if "--explain" in flags else None
        with open_executor(config) as executor:
            plan = job.plan(executor)
    windows = [window["packs"] for window in plan["windows"]]  # of each, the packs of its shards
    shards, packs = sum(map(len, windows)), sum(map(sum, windows))
    if choice is not None and not as_json:
        print("\n".join(budget_lines(choice, explain=True)), end="\n\n")
    explained = {"explain": choice} if choice is not None and as_json else {}
    _say({"plan": f"{config.output}/plan", "shards": shards, "packs": packs, **explained}, as_json)
    return 0


def _pack(words: list[str], as_json: bool) -> int:
    from preprocess.job import open_executor, open_job

    config = _config(words)
    with open_job(config) as job:
        job.require_index()
        with open_executor(config) as executor:
            job.pack(executor)
        stats = job.finish()
    _say({"dataset": config.output, "fill": stats["fill"]}, as_json)
    return 0


def _report(words: list[str], as_json: bool) -> int:
    path = _dataset(words) / "report" / "stats.json"
    stats = read_json(path, mend="run `python -m preprocess run` to its end")
    if as_json:
        print(json.dumps(stats))
    else:
        print_report(stats, Console())
    return 0


def _verify(words: list[str], as_json: bool) -> int:
    counts, faults = verify_dataset(_dataset(words))
    if as_json:
        print(json.dumps({**counts, "faults": faults}))
        return 1 if faults else 0
    for fault in faults:
        print(fault)
    checked = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"{words[0]}: {f'{len(faults)} faults' if faults else 'no fault'} in {checked}")
    return 1 if faults else 0


def _inspect(words: list[str], as_json: bool) -> int:
    options = load_config(InspectOptions, None, words[1:])
    with open_anywhere(_dataset(words[:1])) as dataset:
        return _show(dataset, options, as_json)


def _show(dataset: DataSet, options: InspectOptions, as_json: bool) -> int:
    if options.sample:
        places, rejects = find_sample(dataset, options.sample, options.source)
    else:
        places, rejects = [(options.split, options.pack)], []
    packs = [pack_record(dataset, split, pack) for split, pack in places]
    if as_json:
        print(json.dumps({"packs": packs, "rejects": rejects}))
        return 0
    for record in packs:
        print("\n".join(describe_pack(record, dataset, options.sample)))
    for reject in rejects:
        print(f"rejected: {reject['source']} {reject['key']}: {reject['reason']} ({reject['detail']})")
    return 0


def _download(words: list[str], as_json: bool) -> int:
    if len(words) != 2 or is_remote(words[1]):
        raise UserError("expected two arguments, a data set's URI and a directory of this machine")
    counts = download_dataset(as_path(words[0]), Path(words[1]))
    _say({"dataset": words[1], **counts}, as_json)
    return 0


def _fetch(words: list[str], as_json: bool) -> int:
    from preprocess.fetch import command

    return command.main(words, as_json)


def _synthesize(words: list[str], as_json: bool) -> int:
    from preprocess import synthetic

    synthetic.main([*words, *(["--json"] if as_json else [])])
    return 0


def _say(record: dict[str, object], as_json: bool) -> None:
    print(json.dumps(record) if as_json else ", ".join(f"{key} {value}" for key, value in record.items()))


def _run_command_line() -> int:
    """As `main`; ends without a word, with 1, when nobody reads what is printed (`... | head`)."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # SIGPIPE stays ignored, or a socket that breaks would kill the process; such an error is not of stdout.
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        return 1


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(_run_command_line())
