"""The campaign: ask, evaluate, record, tell, until the budget is spent; then judge and write the child.

One loop serves both a fresh start and a resume: it asks the optimizer again from its seed, finds in
the ledger what was asked and scored before, and does only what is missing.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from orchestrator.breeding import (
    check_breeding,
)
from orchestrator.config import CampaignConfig, config_to_dict, differing_keys, engine_settings
from orchestrator.contamination import CONTAMINATION_FILE, contamination, warnings_about
from orchestrator.engine_description import engine_changes
from orchestrator.errors import EngineMismatchError, not_repeated
from orchestrator.examination import fingerprint, load_examination
from orchestrator.experts.match_stage import check_can_match, paired, recorded_or_matched
from orchestrator.experts.matching import Matching
from orchestrator.finishing import finish, judge_child
from orchestrator.genomes.build import build_space
from orchestrator.genomes.space import Space
from orchestrator.inputs import Inputs, absolute_places, open_inputs
from orchestrator.ledger.lease import Lease, acquire_lease
from orchestrator.ledger.ledger import LeaseLostError, Ledger
from orchestrator.ledger.record_shapes import campaign_records
from orchestrator.ledger.state import CampaignState, Candidate, scored_record
from orchestrator.mri.prescribing import describe_space, notes_on_search, recorded_or_scanned
from orchestrator.mri.prescription import Prescription
from orchestrator.objectives import item_weights, task_weights
from orchestrator.pool.pool import Job, Pool, Progress
from orchestrator.racing.generation import check_can_race
from orchestrator.reporting.report import REPORT_FILE, write_report
from orchestrator.search import build_optimizer
from orchestrator.searching import Search
from orchestrator.watching.meter import SPENDING_KINDS, Meter
from workers.errors import BadInputError
from workers.evaluation.task import BLOCK_BATCHES
from workers.merging import Recipe, passthrough_recipe
from workers.merging.plan import Plan, form_of
from workers.secrecy import hide
from workers.storage import Store, check_store, open_store
from workers.storage.documents import damage_named


class Watcher(Protocol):
    """Who is told how a campaign goes. `notify` comes after each thing that happened.

    `happened` comes with each record of the ledger, when it is written, and with what becomes of workers:
    events of the kind `worker`, as `Crew.tell` gives them, which are not recorded.
    """

    def begin(self, campaign: Campaign) -> None: ...
    def stage(self, name: str) -> None: ...
    def notify(self, campaign: Campaign) -> None: ...
    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None: ...


class Campaign:
    """One campaign, from its configuration to its published child."""

    def __init__(self, config: CampaignConfig, watcher: Watcher) -> None:
        self.config = config
        self.watcher = watcher
        self.weights = task_weights(config)
        self.store: Store = open_store(config.store).substore(config.name)
        self.inputs: Inputs = open_inputs(config)
        self.matching: Matching | None = None
        check_can_match(config, self.inputs.father_map)
        check_can_race(config)
        # Built here so that a bad configuration fails before anything is written.
        self._enter_space(None)
        self.state = CampaignState(config.objective, (), self.weights)
        self.described: dict[str, Any] = {}
        self.contamination: dict[str, Any] = {}
        self.recipes: dict[str, Recipe] = {}
        """By their ids: parents, and candidates that are evaluated or bred from."""
        self.parent_recipes = {
            name: self.know(passthrough_recipe(self.inputs.references, name))
            for name in self.inputs.parents
        }
        self._check_recipes()
        self.examination = load_examination(config.health, self.inputs.tasks)
        self.identity = self.inputs.identity(config) | {"genome": self.space.identity}
        self.identity["health"]["text"] = fingerprint(self.examination)
        self.meter = Meter()
        self._pool: Pool | None = None
        self._ledger: Ledger | None = None
        self._lease: Lease | None = None

    def _enter_space(self, prescription: Prescription | None) -> None:
        """Make the genome space, as far as it can be without the prescription it may need."""
        inputs, search = self.inputs, self.config.search
        self.prescription = prescription
        space = build_space(
            self.config.genome,
            inputs.father_map,
            inputs.references,
            inputs.base_reference,
            self.config.seed,
            self.config.scan.scans,
            prescription,
            self.config.scan.probe,
        )
        optimizer = build_optimizer(
            search.optimizer,
            space.start,
            search.step,
            search.population,
            self.config.seed,
            item_weights(self.weights, inputs.tasks),
        )
        self.search = Search(self, space, optimizer)

    def _check_recipes(self) -> None:
        """Raise `BadInputError` now if what the search will ask cannot be merged from these parents."""
        start = self.decode(self.space.point(self.space.start))
        self.plan = Plan(self.inputs.maps, self.inputs.base_map, form_of(start))
        for recipe in (start, *self.parent_recipes.values()):
            self.plan.assign(recipe)
        check_breeding(self.config, self.inputs, self.plan, start)

    @property
    def space(self) -> Space:
        """The genome space of the round that is searched."""
        return self.search.space

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome of the round that is searched, its experts paired as they were matched."""
        return paired(self.space.decode(genome), self.matching)

    @property
    def pool(self) -> Pool:
        """The workers, once they are started."""
        assert self._pool is not None
        return self._pool

    @property
    def busy_workers(self) -> int:
        return self._pool.busy if self._pool else 0

    @property
    def ledger(self) -> Ledger:
        """Open for writing, once the campaign is owned."""
        assert self._ledger is not None
        return self._ledger

    # -- the whole way -----------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run or resume to the end; the result as plain data.

        Raises `BadInputError` for input that cannot work, `LeaseLostError` if another driver takes
        over, `PoolError` or `CampaignError` if it cannot go on. Whatever ends it, the same call
        continues it.
        """
        self.watcher.begin(self)
        ledger = self._read_ledger()
        finished = self._finished_before(ledger)
        if finished is not None:
            return finished
        check_store(self.store)
        self._lease = acquire_lease(self.store, self.watcher.stage, ledger.newest_epoch)
        try:
            self._open_ledger(ledger)
            self._look_for_contamination()
            done = self.state.evaluated(self.config.search.evaluations)
            self.watcher.stage(
                "starting Ray and the workers"
                + (f"; {done} candidates are scored already" if done else "")
            )
            with self._make_pool() as self._pool:
                self._match_experts()
                self._prescribe()
                self.evaluate(self.parent_recipes.values(), "search")
                self.search.run()
                candidate = self.search.select()
                return finish(self, candidate, judge_child(self, candidate))
        finally:
            ledger.close()
            self._lease.release()

    def _read_ledger(self) -> Ledger:
        """The campaign's ledger; what it says and will say is in the state."""
        self.state = CampaignState(self.config.objective, (), self.weights)
        ledger = Ledger(self.store, self.state.apply, campaign_records())
        gc.freeze()  # all that was read stays, and need not be looked at by later collections
        return ledger

    def _finished_before(self, ledger: Ledger) -> dict[str, Any] | None:
        """The recorded result, if this very campaign has come to its end."""
        begun, result = ledger.last("campaign"), ledger.result()
        if begun is None or result is None:
            return None
        if begun["identity"] != self.identity:
            self._check_identity(begun["identity"])
            return None  # a larger budget
        if next(self.store.list_objects(REPORT_FILE), None) is None:
            write_report(self.store)  # the driver was stopped just before it
        return result

    def _open_ledger(self, ledger: Ledger) -> None:
        """Begin to write, and make sure that the ledger is this campaign's."""
        assert self._lease is not None
        ledger.open_epoch(self._lease.epoch)
        self._ledger = ledger
        recorded = ledger.last("campaign")
        # Until something was scored, a configuration that did not work may be mended.
        if recorded is not None and self.state.has_scores:
            self._check_identity(recorded["identity"])
        if recorded is None or recorded["identity"] != self.identity:
            self.record("campaign", identity=self.identity, config=config_to_dict(self.config))
        price = self.config.cost
        if self.state.spending.price != (price.per_hour, price.currency):
            self.record("price", per_hour=price.per_hour, currency=price.currency)

    def _check_identity(self, recorded: dict[str, Any]) -> None:
        if recorded.get("scoring", 1) != self.identity["scoring"]:
            raise BadInputError(
                f"{self.store.uri}: holds a campaign of another version of Darwin, which asks and scores "
                "items otherwise. Go on with that version, or choose another name (`darwin status` and "
                "`darwin report` read both)"
            )
        # What a child must be like to be published steers no search.
        different = [
            # Of the genome only its content is recorded, wherever its file lies.
            "genome" if key.startswith("genome.") else key
            for key in differing_keys(recorded, self.identity)
            if not key.startswith("health.")
        ]
        with damage_named(f"{self.store.uri}: its record of the campaign"):
            old, new = recorded["search"]["evaluations"], self.config.search.evaluations
        # With rounds, another budget would end the first one elsewhere.
        if new > old and self.config.breeding.rounds == 1:
            different.remove("search.evaluations")  # a larger budget is welcome
        if different:
            raise BadInputError(
                f"{self.store.uri}: holds a campaign with another configuration; these keys differ: "
                f"{', '.join(dict.fromkeys(different))}. Give the old values back, or choose another name"
            )

    def record(self, kind: str, **content: Any) -> None:
        """Into the ledger first, which hands it to the state."""
        assert self._ledger is not None and self._lease is not None
        if self._lease.lost:
            raise LeaseLostError(f"{self.store.uri}: another driver has taken over; this one stops")
        if kind in SPENDING_KINDS and (reserved := self.meter.read()).worker:
            content["reserved"] = reserved.to_dict()
        self.watcher.happened(self, self._ledger.append(kind, **content))

    def record_once(self, kind: str, **content: Any) -> None:
        """Record a decision, unless it was recorded already since the campaign got its budget."""
        known = [record for record in self.ledger.since_begun() if record["kind"] == kind]
        if not known or any(known[-1][key] != value for key, value in content.items()):
            self.record(kind, **content)

    def _make_pool(self) -> Pool:
        # Here, not above: what runs on workers needs torch, and a driver that only reads does not.
        from workers.evaluation_worker import WorkerSpec

        parents, base = absolute_places(self.inputs)
        engine = self.config.engine
        spec = WorkerSpec(
            parents=parents,
            base=base,
            fingerprints={
                reference.name: reference.fingerprint
                for reference in (*self.inputs.references, self.inputs.base_reference)
                if reference is not None
            },
            threads=max(1, int(self.config.workers.cpus)),
            tasks=self.inputs.tasks,
            block_items=BLOCK_BATCHES * engine.batch_size,
            engine=engine_settings(engine),
            campaign=self.config.name,
        )
        config = self.config
        return Pool(
            spec, config.workers, config.address, self._check_engine, config.priority, self._hear
        )

    def _hear(self, event: dict[str, Any]) -> None:
        """Of a worker: see `Crew.tell`."""
        self.meter.apply(event)
        self.watcher.happened(self, {"kind": "worker", **event})

    def _check_engine(self, description: dict[str, Any]) -> None:
        """All scores of a campaign come from engines that are alike, today's and last week's."""
        assert self._ledger is not None
        recorded = self._ledger.last("engine")
        if recorded is not None and not self.state.has_scores:
            # Nothing depends yet on what an earlier driver's workers were; on this one's it will.
            recorded = recorded if recorded["epoch"] == self._ledger.epoch else None
        if recorded is None:
            self.record("engine", description=description)
            return
        changes = engine_changes(recorded["description"], description)
        if changes:
            raise EngineMismatchError(
                f"this worker would score differently from those before ({', '.join(changes)}); restore "
                "the environment that the campaign began with, or start one of another name"
            )

    def _look_for_contamination(self) -> None:
        """Compare the items that steer with those that judge, and say so if too many are alike."""
        self.contamination = contamination(self.inputs)
        text = json.dumps(self.contamination, ensure_ascii=False, indent=1)
        self.store.write(CONTAMINATION_FILE, text.encode())
        for warning in warnings_about(self.contamination):
            self.watcher.stage(warning)

    def _match_experts(self) -> None:
        """Find which experts of the donors belong to the father's, if the campaign asks for that."""
        self.matching = recorded_or_matched(
            self.config, self.inputs, self.ledger, self.record, self.pool, self.watcher.stage
        )
        if self.matching is not None:
            self._check_recipes()

    def _prescribe(self) -> None:
        """Scan the parents if the genome space asks for it, and tell which genes will not be searched."""
        if self.space.to_prescribe:
            self._enter_space(
                recorded_or_scanned(
                    self.config, self.inputs, self.space, self.ledger, self.record, self.pool,
                    self.watcher.stage, self.matching.orders if self.matching else None,
                )
            )  # fmt: skip
            self._check_recipes()
        self.described = described = describe_space(self.space, self.prescription)
        if self.prescription is not None or self.space.removed:
            self.record_once("space", **described)
        for note in notes_on_search({"space": described}):
            self.watcher.stage(note)

    # -- evaluating --------------------------------------------------------------------------

    def know(self, recipe: Recipe) -> Recipe:
        """Keep the recipe by its id; itself."""
        self.recipes[recipe.id] = recipe
        return recipe

    def recipe_of(self, candidate: Candidate) -> Recipe:
        """The recipe of a candidate that was asked for, from its genome if it is not known any more."""
        known = self.recipes.get(candidate.recipe_id)
        if known is not None:
            return known
        space = self.search.space_of(candidate)
        recipe = paired(space.decode(candidate.genome), self.matching)
        if recipe.id != candidate.recipe_id:
            raise not_repeated(self.store.uri, f"recipe {candidate.recipe_id[:12]}")
        return self.know(recipe)

    def forget(self, recipe_ids: Iterable[str]) -> None:
        """Keep the recipes of candidates no longer: there may be many, and each is some kilobytes."""
        kept = {recipe.id for recipe in self.parent_recipes.values()} | self.search.survivors
        for recipe_id in set(recipe_ids) - kept:
            self.recipes.pop(recipe_id, None)

    def evaluate(
        self,
        recipes: Iterable[Recipe],
        split: str,
        chosen: Mapping[str, dict[str, list[str]]] | None = None,
    ) -> None:
        """Score the recipes on the split, as far as the ledger does not know already.

        `chosen` may name the items of each recipe, by its id: task -> item ids.
        """
        jobs = []
        for recipe in {recipe.id: recipe for recipe in recipes}.values():
            evaluation = self.state.evaluation(recipe.id, split)
            own = None if chosen is None else chosen[recipe.id]
            if not evaluation.complete and not evaluation.has(own):
                finished = evaluation.finished_items
                jobs.append(Job(recipe.id, recipe, split, finished=finished, chosen=own))
        for progress in self.pool.run(jobs):
            self._record_progress(progress)
            self.watcher.notify(self)

    def evaluate_as_asked(self, supply: Callable[[], Job | None]) -> Iterator[Progress]:
        """Score what `supply` gives, asked whenever a worker may need it; progress when it is recorded."""
        for progress in self.pool.run((), supply):
            self._record_progress(progress)
            yield progress
            self.watcher.notify(self)

    def _is_last(self, progress: Progress) -> bool:
        """Whether with this progress of a job of chosen items every item of the split is scored."""
        assert progress.scored is not None
        known = self.state.evaluation(progress.job.key, progress.job.split).results
        return progress.scored.complete and all(
            {item.id for item in task.items[progress.job.split]}
            <= known.get(task.name, {}).keys()
            | {i["id"] for i in progress.scored.items.get(task.name, ())}
            for task in self.inputs.tasks
        )

    def _record_progress(self, progress: Progress) -> None:
        job, scored = progress.job, progress.scored
        seconds = scored.realize_seconds + scored.score_seconds if scored else progress.seconds
        spent: dict[str, Any] = {"waited_seconds": round(progress.waited, 3)}
        if (used := self.meter.used(progress.worker, seconds)).worker:
            spent["used"] = used.to_dict()
        if scored is not None:
            self.record(
                "scored",
                **scored_record(job.key, job.split, progress.worker, scored)
                | ({"complete": self._is_last(progress)} if job.chosen is not None else {}),
                **spent,
            )
        else:
            self.record(
                "failed",
                recipe=job.key,
                split=job.split,
                worker=progress.worker,
                error=progress.error and hide(progress.error),
                given_up=progress.given_up,
                **spent,
            )
