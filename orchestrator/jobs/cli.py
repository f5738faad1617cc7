"""The command line of campaigns on a cluster: `darwin submit`, `list`, `logs`, `stop`, `resume`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.console import JsonFlag, print_json, say

if TYPE_CHECKING:
    from orchestrator.config import CampaignConfig
    from orchestrator.jobs.cluster import Cluster

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values over the recorded ones."),
]
CampaignPlace = Annotated[
    str, typer.Argument(metavar="STORE/NAME", help="Where the campaign is kept.")
]
ADDRESS = typer.Option(
    metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's Jobs API: http://HEAD:8265."
)
Address = Annotated[str, ADDRESS]
MaybeAddress = Annotated[str | None, ADDRESS]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print what the driver says until it ends.")
]
Installed = Annotated[
    bool,
    typer.Option("--installed", help="Run what is installed on the nodes, instead of this code."),
]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Do not look at parents and tasks from this machine.")
]
Environment = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME=VALUE", help="For driver and workers, no secret; repeated."
    ),
]


def submit(
    campaign: Annotated[str, typer.Argument(metavar="CAMPAIGN.yaml", help="The campaign file.")],
    address: Address,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values over the file's.")
    ] = None,
    follow: Follow = False,
    installed: Installed = False,
    unchecked: Unchecked = False,
    environment: Environment = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a campaign on a cluster, or attach to it if it runs there already."""
    from orchestrator.config import load_config

    config = load_config(campaign, overrides)
    _submit(config, address, follow, installed, unchecked, environment, as_json)


def resume(
    place: CampaignPlace,
    address: Address,
    overrides: Overrides = None,
    follow: Follow = False,
    installed: Installed = False,
    unchecked: Unchecked = False,
    environment: Environment = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with a campaign on a cluster, with the configuration that its store has recorded."""
    from orchestrator.jobs.submitting import recorded_campaign

    config = recorded_campaign(place, overrides or [])
    _submit(config, address, follow, installed, unchecked, environment, as_json)


def _submit(
    config: CampaignConfig,
    address: str,
    follow: bool,
    installed: bool,
    unchecked: bool,
    environment: list[str] | None,
    as_json: bool,
) -> None:
    from orchestrator.jobs.cluster import Cluster
    from orchestrator.jobs.submitting import submit_campaign

    cluster = Cluster(address)
    done = submit_campaign(
        config, cluster, _note, installed=installed, unchecked=unchecked,
        assignments=environment or [],
    )  # fmt: skip
    if done.attached and not done.same_configuration:
        _note(
            "the job that runs has another configuration: to go on with this one, first "
            f"darwin stop {done.job.campaign} --address {cluster.address}"
        )
    result = done.job.to_dict() | {"attached": done.attached, "address": cluster.address}
    if not done.attached:
        result["status"] = "submitted"
    if not as_json:
        say(f"{done.job.id}\n{done.job.campaign}")
        if done.attached:
            _note(f"attached to the job that is {done.job.status} already")
    if follow:
        _follow(cluster, done.job.id, result, as_json)
    elif as_json:
        print_json(result)


def _follow(cluster: Cluster, job_id: str, result: dict[str, object], as_json: bool) -> None:
    from orchestrator.jobs.cluster import INTERRUPTED
    from orchestrator.jobs.logs import ended_line, exit_code_of, follow_logs

    # With --json standard output is for the one object.
    output = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        print(text, end="", file=output, flush=True)

    job = cluster.read(job_id)
    if job.status == "pending":
        _note(job.message)
    try:
        job = follow_logs(cluster, job, write)
    except KeyboardInterrupt:
        _note(
            f"{job_id} goes on; darwin logs {job_id} -f --address {cluster.address} follows it again"
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result | job.to_dict())
    else:
        say(ended_line(job))
    if code := exit_code_of(job):
        raise typer.Exit(code)


def logs(
    name: Annotated[
        str, typer.Argument(metavar="STORE/NAME|JOB", help="A campaign (its newest job), or a job.")
    ],
    address: Address,
    follow: Follow = False,
    as_json: JsonFlag = False,
) -> None:
    """What a campaign's driver says. With --follow, until it ends, and then with its exit code."""
    from orchestrator.jobs.cluster import Cluster
    from orchestrator.jobs.logs import ended_line, read_logs

    cluster = Cluster(address)
    job = cluster.find(name)
    if follow:
        _follow(cluster, job.id, {}, as_json)
        return
    text = read_logs(cluster, job)
    if as_json:
        print_json(job.to_dict() | {"logs": text})
    else:
        print(text.rstrip("\n"))
        _note(ended_line(job))


def stop(
    place: CampaignPlace,
    address: MaybeAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Stop a campaign's driver, wherever it runs; its state is saved, and it can be resumed."""
    from orchestrator.jobs.cluster import Cluster
    from orchestrator.jobs.stopping import stop_campaign
    from workers.storage import open_store

    cluster = Cluster(address) if address else None
    if cluster is not None and (job := cluster.job(place)) is not None:
        place = job.campaign
    result = stop_campaign(open_store(place.rstrip("/")), cluster, _note)
    if as_json:
        print_json(result)
    else:
        ended = f", job {result['job']['job']} {result['job']['status']}" if result["job"] else ""
        say(f"{result['campaign']}: {result['driver']}{ended}")


def list_campaigns(
    store: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="A folder, or s3://..., of campaigns.")
    ] = None,
    address: MaybeAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """The campaigns of a store (runs, if nothing is given), the Darwin jobs of a cluster, or both."""
    from orchestrator.jobs.cluster import Cluster
    from orchestrator.jobs.listing import list_everything, render_list

    if store is None and address is None:
        store = "runs"
    result = list_everything(store, Cluster(address) if address else None)
    if as_json:
        print_json(result)
    else:
        say(render_list(result))


def register(app: typer.Typer) -> None:
    """Add the commands to `darwin`."""
    app.command("submit")(submit)
    app.command("list")(list_campaigns)
    app.command("logs")(logs)
    app.command("stop")(stop)
    app.command("resume")(resume)


def _note(text: str) -> None:
    print(f"darwin: {text}", file=sys.stderr)
