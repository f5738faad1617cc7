"""The `darwin` command. Each command imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from typing import Annotated, NoReturn

import typer

from orchestrator.console import JsonFlag, complain, json_alone
from orchestrator.console import print_json as _print_json
from orchestrator.console import say as _say
from orchestrator.evaluating.cli import evaluate
from orchestrator.jobs.cli import register

app = typer.Typer(
    name="darwin",
    pretty_exceptions_enable=False,
    add_completion=False,
)

OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Python looks for garbage after every 700 objects by default: a third of the time to import torch."""

DONE, FAILED, BAD_INPUT, REJECTED, INTERRUPTED = 0, 1, 2, 3, 130
CampaignPlace = Annotated[
    str, typer.Argument(metavar="STORE/NAME", help="Where the campaign is kept.")
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from orchestrator.descent.lineage import package_version

        _say(f"darwin {package_version()}")
        raise typer.Exit


@app.callback()
def darwin(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Breed language models without training: search for the merge that beats every parent."""


@app.command()
def run(
    campaign: Annotated[str, typer.Argument(metavar="CAMPAIGN.yaml", help="The campaign file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's.")
    ] = None,
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Add what happens to it, as JSON lines.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a campaign, or resume it if its store already holds it. Ends with 3 if the child is rejected."""
    from orchestrator.config import load_config

    config = load_config(campaign, overrides)
    from orchestrator.campaign import Campaign
    from orchestrator.watching.watchers import watching

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with watching(config, log) as watchers:
        result = Campaign(config, watchers).run()
    if as_json:
        _print_json(result)
    else:
        from orchestrator.reporting.result_lines import result_lines

        for line in result_lines(result):
            _say(line)
    if result["status"] == "rejected":
        raise typer.Exit(REJECTED)


@app.command()
def plan(
    campaign: Annotated[str, typer.Argument(metavar="CAMPAIGN.yaml", help="The campaign file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's.")
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="Plan parents that are not files here as a described model; repeated.",
        ),
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="CLUSTER", help="One that ships, or a .yaml of one's own.")
    ] = "gpu8_80gb",
    nodes: Annotated[
        int | None, typer.Option(help="Over the cluster's, as all that follow.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option()] = None,
    cores_per_node: Annotated[int | None, typer.Option()] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of one GPU.")] = None,
    node_memory: Annotated[float | None, typer.Option(help="GB of a node.")] = None,
    disk_size: Annotated[float | None, typer.Option(help="GB of a node's disk.")] = None,
    nic: Annotated[float | None, typer.Option(help="GB/s of a node's network.")] = None,
    disk: Annotated[float | None, typer.Option(help="GB/s of a node's disk.")] = None,
    gpu_copy: Annotated[float | None, typer.Option(help="GB/s from memory to one GPU.")] = None,
    gpu_bandwidth: Annotated[float | None, typer.Option(help="GB/s of a GPU's memory.")] = None,
    keep: Annotated[
        bool | None,
        typer.Option(
            "--keep/--stream",
            help="Parents stay in memory for the search, or are read for each candidate.",
            show_default="kept if they fit",
        ),
    ] = None,
    score: Annotated[
        float, typer.Option(help="Seconds in which an engine scores a candidate.")
    ] = 0,
    as_json: JsonFlag = False,
) -> None:
    """What a campaign will read, write, move and hold, from headers alone. Ends with 2 if it does not fit."""
    from orchestrator.planning.command import plan_campaign, render_plan

    changes: dict[str, float | None] = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "cores_per_node": cores_per_node,
        "gpu_memory": gpu_memory, "node_memory": node_memory, "disk_size": disk_size, "nic": nic,
        "disk": disk, "gpu_copy": gpu_copy, "gpu_bandwidth": gpu_bandwidth,
    }  # fmt: skip
    result = plan_campaign(campaign, overrides or [], cluster, changes, like or [], keep, score)
    if as_json:
        _print_json(result)
    else:
        _say(render_plan(result))
    if result["problems"]:
        raise typer.Exit(BAD_INPUT)


app.command("eval")(evaluate)
register(app)


@app.command()
def status(
    place: CampaignPlace,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing it until the campaign has ended.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Where a campaign stands, read from its store alone."""
    if watch:
        from orchestrator.watching.live_status import watch_status

        watch_status(place, as_json)
        return
    from orchestrator.overview import campaign_overview, render_overview

    overview = campaign_overview(place)
    if as_json:
        _print_json(overview)
    else:
        _say(render_overview(overview))


@app.command()
def report(place: CampaignPlace, as_json: JsonFlag = False) -> None:
    """Write a finished campaign's report.html and items.parquet again, from its store alone."""
    from orchestrator.overview import open_campaign_store
    from orchestrator.reporting.report import write_report

    written = write_report(open_campaign_store(place))
    if as_json:
        _print_json({"status": "done", "report": written})
    else:
        _say(written)


@app.command()
def merge(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE.yaml", help="Parents and rules; or one that ships.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder, or s3://bucket/prefix.")],
    parent: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PLACE", help="A parent's place, over the file's; repeated."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="PLACE", help="The base's place, over the file's.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Split the work over so many Ray workers; 0: over processes here.")
    ] = 0,
    cpus: Annotated[float, typer.Option(help="CPUs, hence threads, of each worker.")] = 1,
    placement: Annotated[
        str,
        typer.Option(
            help="Where workers lie: none, pack, spread (apart, if there is room), strict."
        ),
    ] = "none",
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; else Ray starts on this machine.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write one child, without a search; or go on where writing it was interrupted."""
    from orchestrator.pool.placement import workers_asked_for
    from orchestrator.recipe_file import named_places
    from orchestrator.single_merge import merge_recipe

    pool = workers_asked_for(workers, cpus, placement)
    result = merge_recipe(recipe, out, pool, address, named_places(parent or []), base)
    if as_json:
        _print_json(result)
    else:
        _say(f"{result['child']}: {result['tensors']} tensors, recipe {result['recipe_id'][:12]}")


@app.command()
def align(
    father: Annotated[str, typer.Argument(metavar="FATHER", help="Whose layout it gets.")],
    mother: Annotated[str, typer.Argument(metavar="MOTHER", help="Whose neurons it gets.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder, or s3://bucket/prefix.")],
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE", help="A text, or .jsonl with `text`, that the father reads."),
    ],
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it are read.")] = 4096,
    threshold: Annotated[
        float | None, typer.Option(help="Least compatibility of two layers, 0 to 1.")
    ] = None,
    least_correlation: Annotated[
        float | None,
        typer.Option(help="Least correlation of two neurons; left out, what chance attains."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the father runs: cpu, cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; left out, one for each core.")
    ] = None,
    allow_low_coverage: Annotated[
        bool, typer.Option("--allow-low-coverage", help="Also if under 1 % is changed.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a mother of another architecture as a parent in the father's layout."""
    from orchestrator.aligning.alignment import align_mother, render_alignment

    result = align_mother(
        father,
        mother,
        out,
        calibration,
        threshold=threshold,
        least_correlation=least_correlation,
        tokens=tokens,
        device=device,
        threads=threads,
        allow_low_coverage=allow_low_coverage,
    )
    if as_json:
        _print_json(result)
    else:
        _say(render_alignment(result))


@app.command()
def verify(
    child: Annotated[str, typer.Argument(metavar="CHILD", help="Its folder or s3:// place.")],
    parent: Annotated[
        list[str] | None,
        typer.Option(help="A parent, to compare with element by element; may be repeated."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a child again: shards, index, completeness, NaN, and that it is none of its parents."""
    from orchestrator.verification import verify_child

    result = verify_child(child, parent or [])
    if as_json:
        _print_json(result)
    else:
        for problem in result["problems"]:
            _say(problem)
        changed = ", ".join(f"{count:,} from {name}" for name, count in result["changed"].items())
        _say(
            f"{result['child']} is {result['status']}: {result['files']} files, {result['tensors']} "
            f"tensors, {result['bytes']:,} bytes; elements that differ: {changed}"
        )
    if result["problems"]:
        raise typer.Exit(FAILED)


@app.command()
def attribute(
    child: Annotated[str, typer.Argument(metavar="CHILD", help="Its folder or s3:// place.")],
    parent: Annotated[
        list[str], typer.Option(metavar="NAME=PLACE", help="A parent, the father first; repeated.")
    ],
    base: Annotated[
        str | None, typer.Option(metavar="PLACE", help="What task vectors are taken from.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Which parent a child's weights come from, per component and layer, measured from its bytes."""
    from orchestrator.descent.attribution import attribute_checkpoint, render_attribution
    from orchestrator.recipe_file import named_places

    result = attribute_checkpoint(child, named_places(parent), base)
    if as_json:
        _print_json(result)
    else:
        for warning in result["warnings"]:
            complain(f"warning: {warning}")
        _say(render_attribution(result))


@app.command()
def recipe(
    file: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Ours or mergekit's.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="SPELLING", help="darwin or mergekit; left out, the other one."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print a recipe in the other spelling: ours, or mergekit's where it can express it."""
    from orchestrator.recipe_spelling import respell

    text = respell(file, to)
    if as_json:
        _print_json({"status": "done", "recipe": text})
    else:
        print(text, end="")  # as it is: a terminal's width must not break YAML


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Its folder or s3:// place.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """A checkpoint's architecture map: components, layers, experts, dtypes, bytes, unknown tensors."""
    from orchestrator.overview import checkpoint_overview, render_checkpoint

    overview = checkpoint_overview(checkpoint)
    if as_json:
        _print_json(overview)
    else:
        _say(render_checkpoint(overview))


@app.command()
def scan(
    parents: Annotated[
        list[str],
        typer.Argument(metavar="FATHER [MOTHER]...", help="Checkpoints, the father first."),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Their common ancestor, to compare them with."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Probe their activations on calibration prompts too.")
    ] = False,
    calibration_sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SET",
            help="Prompts to probe with: a name of those that ship, or a .jsonl file; may be repeated.",
        ),
    ] = None,
    streamed: Annotated[
        bool,
        typer.Option(
            "--streamed/--whole",
            help="Probe with one layer of a parent in memory at a time, or with all.",
        ),
    ] = True,
    spans: Annotated[
        int, typer.Option(help="Divide a parent's layers among so many workers, in a pipeline.")
    ] = 1,
    shards: Annotated[
        int, typer.Option(help="Divide the experts of each layer among so many workers.")
    ] = 1,
    out: Annotated[
        str, typer.Option(metavar="STORE", help="A folder, or s3://...: holds scans/.")
    ] = "runs",
    workers: Annotated[
        int, typer.Option(help="Split the work over so many Ray workers; 0: over processes here.")
    ] = 0,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; else Ray starts on this machine.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Model MRI: what each tensor of the parents is like, and how far it is from the others'."""
    from orchestrator.mri.command import scan_checkpoints
    from orchestrator.mri.page import render_summary, summarize
    from orchestrator.mri.probe import choose_probe, probe_peaks, render_peaks
    from orchestrator.pool.placement import workers_asked_for

    pool = workers_asked_for(workers)
    chosen = choose_probe(probe, calibration_sets or [], streamed, spans, shards)
    found, places = scan_checkpoints(parents, base, out, pool, address, chosen)
    if as_json:
        _print_json({"status": "done", **places, **summarize(found), "probe": probe_peaks(found)})
    else:
        _say(render_summary(found))
        if chosen is not None:
            _say(render_peaks(found))
        _say(places["page"])


def main() -> None:
    """Run the command line; errors of users end it with one line and the right exit code."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    # Nor at the end, where all that torch has loaded would be looked through.
    atexit.register(gc.freeze)
    if "--json" not in sys.argv:
        _run(as_json=False)
    # Ray, for one, prints of workers that died, whenever it hears of it.
    with json_alone():
        _run(as_json=True)


def _run(as_json: bool) -> NoReturn:
    from workers.errors import BadInputError

    try:
        code = typer.main.get_command(app).main(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == INTERRUPTED:  # how newer versions of typer report it
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted",
            "interrupted: what is recorded stays, and the same command goes on from there",
            as_json,
        )
        sys.exit(INTERRUPTED)
    except BadInputError as error:
        _fail("bad input", str(error), as_json)
        sys.exit(BAD_INPUT)
    except Exception as error:
        if hasattr(error, "format_message"):
            # Wrong usage: versions of typer differ in the class, but not in this method.
            _fail("bad input", f"{error.format_message()} (see --help)", as_json)
            sys.exit(BAD_INPUT)
        if not _is_foreseen(error):
            raise
        _fail("failed", str(error), as_json)
        sys.exit(FAILED)
    sys.exit(code or DONE)


def _is_foreseen(error: Exception) -> bool:
    """Whether the message says it all; anything else is a bug, and its traceback is wanted."""
    from orchestrator.aligning.alignment import LowCoverageError
    from orchestrator.errors import CampaignError, PoolError
    from orchestrator.ledger.ledger import LeaseLostError
    from workers.storage import StorageError

    foreseen = CampaignError | LeaseLostError | LowCoverageError | PoolError | StorageError
    return isinstance(error, foreseen)


def _fail(status: str, message: str, as_json: bool) -> None:
    from workers.secrecy import hide

    message = hide(" ".join(message.split()))
    complain(message)
    if as_json:
        _print_json({"status": status, "error": message})


if __name__ == "__main__":
    main()
