"""The campaign: ask, evaluate, record, tell, until the budget is spent; then judge and write the child.

One loop serves both a fresh start and a resume: it asks the optimizer again from its seed, finds in
the ledger what was asked and scored before, and does only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from orchestrator.attribution import attribute_written
from orchestrator.breeding import (
    LEAST_SURVIVORS,
    Round,
    begin_round,
    bred_ancestors,
    check_breeding,
    limit_of,
    round_record,
    rounds_for_lineage,
)
from orchestrator.card import build_card
from orchestrator.config import CampaignConfig, config_to_dict, differing_keys
from orchestrator.ending import Ending
from orchestrator.examination import fingerprint, load_examination
from orchestrator.family_tree import add_ancestry
from orchestrator.flat_fitness import FlatFitness, flat_fitness
from orchestrator.gates import engine_gates, summarize
from orchestrator.genome import build_space
from orchestrator.inputs import Inputs, absolute_places, open_inputs
from orchestrator.judgement import Judgement, judge
from orchestrator.lease import Lease, acquire_lease
from orchestrator.ledger import LeaseLostError, Ledger
from orchestrator.lineage import ATTRIBUTION_FILE, LINEAGE_FILE, build_lineage, lineage_bytes
from orchestrator.pool import EngineMismatchError, Job, Pool, Progress
from orchestrator.prescribing import describe_space, notes_on_search, recorded_or_scanned
from orchestrator.prescription import Prescription
from orchestrator.report import REPORT_FILE, write_report
from orchestrator.search import build_optimizer
from orchestrator.space import Space
from orchestrator.state import CampaignState, Candidate, scored_record
from workers.checkpoints import open_checkpoint
from workers.errors import BadInputError
from workers.merging import Recipe, passthrough_recipe
from workers.merging.plan import Plan
from workers.storage import Store, check_store, open_store

STAGNANT_GENERATIONS = 3
"""After so many generations without a recipe that is new, the search has nothing left to ask."""


class CampaignError(RuntimeError):
    """The campaign cannot go on, though its input was right."""


class Watcher(Protocol):
    """Who is told how a campaign goes. `notify` comes after each thing that happened."""

    def begin(self, campaign: Campaign) -> None: ...
    def stage(self, name: str) -> None: ...
    def notify(self, campaign: Campaign) -> None: ...


class Campaign:
    """One campaign, from its configuration to its published child."""

    def __init__(self, config: CampaignConfig, watcher: Watcher) -> None:
        self.config = config
        self.watcher = watcher
        self.store: Store = open_store(config.store).substore(config.name)
        self.inputs: Inputs = open_inputs(config)
        # Built here so that a bad configuration fails before anything is written.
        self._enter_space(None)
        self.state = CampaignState(config.objective)
        self.round = 1
        self.rounds: dict[int, Round] = {}
        """Those after the first, which have spaces and optimizers of their own."""
        self.described: dict[str, Any] = {}
        self.recipes: dict[str, Recipe] = {}
        self.parent_recipes = {
            name: self._know(passthrough_recipe(self.inputs.references, name))
            for name in self.inputs.parents
        }
        self._check_recipes()
        self.examination = load_examination(config.health, self.inputs.tasks)
        self.identity = self.inputs.identity(config) | {"genome": self.space.identity}
        self.identity["health"]["text"] = fingerprint(self.examination)
        self.flat: FlatFitness | None = None
        self.ended = ""
        self.pool: Pool | None = None
        self._ledger: Ledger | None = None
        self._lease: Lease | None = None

    def _enter_space(self, prescription: Prescription | None) -> None:
        """Make the genome space, as far as it can be without the prescription it may need."""
        inputs, search = self.inputs, self.config.search
        self.prescription = prescription
        self.space: Space = build_space(
            self.config.genome,
            inputs.father_map,
            inputs.references,
            inputs.base_reference,
            self.config.seed,
            self.config.scan.scans,
            prescription,
        )
        self.optimizer = build_optimizer(
            search.optimizer, self.space.start, search.step, search.population, self.config.seed
        )

    def _check_recipes(self) -> None:
        """Raise `BadInputError` now if what the search will ask cannot be merged from these parents."""
        self.plan = Plan(self.inputs.maps, self.inputs.base_map)
        start = self.space.decode(self.space.point(self.space.start))
        for recipe in (start, *self.parent_recipes.values()):
            self.plan.assign(recipe)
        check_breeding(self.config, self.inputs, self.plan, start)

    # -- the whole way -----------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run or resume to the end; the result as plain data.

        Raises `BadInputError` for input that cannot work, `LeaseLostError` if another driver takes
        over, `PoolError` or `CampaignError` if it cannot go on. Whatever ends it, the same call
        continues it.
        """
        self.watcher.begin(self)
        finished = self._finished_before()
        if finished is not None:
            return finished
        check_store(self.store)
        ledger = Ledger(self.store)
        newest_epoch = max((record["epoch"] for record in ledger.records), default=0)
        self._lease = acquire_lease(self.store, self.watcher.stage, newest_epoch)
        try:
            self._open_ledger(ledger)
            done = self.state.evaluated(self.config.search.evaluations)
            self.watcher.stage(
                "starting Ray and the workers"
                + (f"; {done} candidates are scored already" if done else "")
            )
            with self._make_pool() as self.pool:
                self._prescribe()
                self._evaluate(self.parent_recipes.values(), "search")
                self._search()
                candidate = self._select()
                judgement = self._judge(candidate)
                return self._finish(candidate, judgement)
        finally:
            self._lease.release()

    def _finished_before(self) -> dict[str, Any] | None:
        """The recorded result, if this very campaign has come to its end."""
        ledger = Ledger(self.store)
        begun, result = ledger.last("campaign"), ledger.result()
        if begun is None or result is None:
            return None
        if begun["identity"] != self.identity:
            self._check_identity(begun["identity"])
            return None  # a larger budget
        self.state = CampaignState(self.config.objective, ledger.records)
        if next(self.store.list_objects(REPORT_FILE), None) is None:
            write_report(self.store)  # the driver was stopped just before it
        return result

    def _open_ledger(self, ledger: Ledger) -> None:
        """Begin to write, and make sure that the ledger is this campaign's."""
        assert self._lease is not None
        ledger.open_epoch(self._lease.epoch)
        self._ledger = ledger
        self.state = CampaignState(self.config.objective, ledger.records)
        recorded = ledger.last("campaign")
        # Until something was scored, a configuration that did not work may be mended.
        if recorded is not None and self.state.has_scores:
            self._check_identity(recorded["identity"])
        if recorded is None or recorded["identity"] != self.identity:
            self._record("campaign", identity=self.identity, config=config_to_dict(self.config))

    def _check_identity(self, recorded: dict[str, Any]) -> None:
        # What a child must be like to be published steers no search.
        different = [
            key for key in differing_keys(recorded, self.identity) if not key.startswith("health.")
        ]
        old, new = recorded["search"]["evaluations"], self.config.search.evaluations
        # With rounds, another budget would end the first one elsewhere.
        if new > old and self.config.breeding.rounds == 1:
            different.remove("search.evaluations")  # a larger budget is welcome
        if different:
            raise BadInputError(
                f"{self.store.uri}: holds a campaign with another configuration; these keys differ: "
                f"{', '.join(different)}. Give the old values back, or choose another name"
            )

    def _record(self, kind: str, **content: Any) -> None:
        """Into the ledger first, then into the state."""
        assert self._ledger is not None and self._lease is not None
        if self._lease.lost:
            raise LeaseLostError(f"{self.store.uri}: another driver has taken over; this one stops")
        self.state.apply(self._ledger.append(kind, **content))

    def _make_pool(self) -> Pool:
        # Here, not above: what runs on workers needs torch, and a driver that only reads does not.
        from workers.actors import WorkerSpec

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
            batch_size=engine.batch_size,
            engine={"dtype": engine.dtype, "device": engine.device, "threads": engine.threads},
        )
        return Pool(spec, self.config.workers, self.config.address, self._check_engine)

    def _check_engine(self, description: dict[str, Any]) -> None:
        """All scores of a campaign come from engines that are alike, today's and last week's."""
        assert self._ledger is not None
        recorded = self._ledger.last("engine")
        if recorded is not None and not self.state.has_scores:
            # Nothing depends yet on what an earlier driver's workers were; on this one's it will.
            recorded = recorded if recorded["epoch"] == self._ledger.epoch else None
        if recorded is None:
            self._record("engine", description=description)
            return
        different = differing_keys(recorded["description"], description)
        if different:
            changes = ", ".join(
                f"{key} {recorded['description'].get(key)!r} -> {description.get(key)!r}"
                for key in different
            )
            raise EngineMismatchError(
                f"this worker would score differently from those before ({changes}); restore the "
                "environment that the campaign began with, or start one of another name"
            )

    def _prescribe(self) -> None:
        """Scan the parents if the genome space asks for it, and tell which genes will not be searched."""
        assert self.pool is not None and self._ledger is not None
        if self.space.to_prescribe:
            self._enter_space(
                recorded_or_scanned(
                    self.config, self.inputs, self.space, self._ledger, self._record, self.pool,
                    self.watcher.stage,
                )
            )  # fmt: skip
            self._check_recipes()
        self.described = described = describe_space(self.space, self.prescription)
        if self.prescription is not None or self.space.removed:
            self._record_once("space", **described)
        for note in notes_on_search({"space": described}):
            self.watcher.stage(note)

    # -- evaluating --------------------------------------------------------------------------

    def _know(self, recipe: Recipe) -> Recipe:
        self.recipes[recipe.id] = recipe
        return recipe

    def _evaluate(self, recipes: Iterable[Recipe], split: str) -> None:
        """Score the recipes on the split, as far as the ledger does not know already."""
        assert self.pool is not None
        jobs = []
        for recipe in {recipe.id: recipe for recipe in recipes}.values():
            evaluation = self.state.evaluation(recipe.id, split)
            if not evaluation.complete:
                jobs.append(Job(recipe.id, recipe, split, finished=evaluation.finished_items))
        for progress in self.pool.run(jobs):
            self._record_progress(progress)
            self.watcher.notify(self)

    def _record_progress(self, progress: Progress) -> None:
        job = progress.job
        if progress.scored is not None:
            self._record(
                "scored", **scored_record(job.key, job.split, progress.worker, progress.scored)
            )
        else:
            self._record(
                "failed",
                recipe=job.key,
                split=job.split,
                worker=progress.worker,
                error=progress.error,
                given_up=progress.given_up,
            )

    # -- searching ---------------------------------------------------------------------------

    def _search(self) -> None:
        """Run the search, and record why it ended and what it took."""
        assert self.pool is not None and self._ledger is not None
        self.watcher.stage("search")
        started, idle = time.monotonic(), self.pool.idle_seconds
        self.ended = reason = self._run_rounds()
        if self.flat is not None:
            self.watcher.stage(f"stopped: {reason}")
        seconds = time.monotonic() - started
        evaluations = self.state.evaluated(self.config.search.evaluations)
        if not any(record["kind"] == "searched" for record in self._ledger.since_begun()):
            self._record(
                "searched",
                evaluations=evaluations,
                reason=reason,
                seconds=round(seconds, 3),
                driver_seconds=round(seconds - (self.pool.idle_seconds - idle), 3),
                **({"flat": self.flat.to_dict()} if self.flat else {}),
            )

    def _run_rounds(self) -> str:
        """One round, or several of which each begins with the best children of the one before; why the
        last one ended."""
        rounds = self.config.breeding.rounds
        if rounds > 1:
            self._record_round(round_record(1, limit_of(self.config, 1), {}))
        reason = self._run_generations()
        for number in range(2, rounds + 1):
            best = self.state.best_of_round(
                self.round, self.config.breeding.survivors, self.config.search.evaluations
            )
            if self.flat is not None:
                return reason
            if len(best) < LEAST_SURVIVORS:
                return f"round {self.round} had fewer than {LEAST_SURVIVORS} children to breed from"
            survivors = [(candidate, self.recipes[candidate.recipe_id]) for candidate in best]
            found = begin_round(self.config, self.inputs, self.plan, number, survivors)
            self._record_round(found.to_record())
            self.watcher.stage(f"search, round {number} of {rounds}: {len(best)} parents")
            self.round, self.rounds[number] = number, found
            self.space, self.optimizer = found.space, found.optimizer
            reason = self._run_generations()
        return reason

    def _record_round(self, content: dict[str, Any]) -> None:
        """Record that a round begins, or make sure that it began so before."""
        known = self.state.rounds.get(content["round"])
        if known is None:
            self._record("round", **content)
        elif any(known[key] != value for key, value in content.items()):
            raise CampaignError(
                f"{self.store.uri}: round {content['round']} does not begin as recorded: another version "
                "of Darwin ran before. Restore it, or start a campaign of another name"
            )

    def _run_generations(self) -> str:
        """Generations until the budget is spent or the optimizer has nothing left to ask; which."""
        budget = self.config.search.evaluations
        limit = limit_of(self.config, self.round)
        generation, stagnant = self.state.generations_through(self.round - 1), 0
        earlier = self.state.within_budget(budget)[:generation]
        known = {candidate.recipe_id for asked in earlier for candidate in asked}
        while stagnant < STAGNANT_GENERATIONS:
            stopped = self.optimizer.stopped()
            if stopped is not None:
                return f"the optimizer stopped: {stopped}"
            asked_before = self.state.generations_through(self.round)
            if len(known) >= limit and generation == asked_before:
                return "the budget is spent"
            points = self.optimizer.ask()
            asked = self._asked(generation, points)
            paid = self.state.within_budget(budget)[generation:]
            candidates = paid[0] if paid else []
            self._evaluate((self.recipes[c.recipe_id] for c in candidates), "search")
            if len(candidates) < len(asked):
                return "the budget is spent"
            self.optimizer.tell(points, self._fitness_for_tell(generation))
            self.flat = flat_fitness(self.state, self.inputs.tasks, self.config.objective, budget)
            if self.flat is not None:
                return self.flat.reason
            new = {c.recipe_id for c in asked} - known
            stagnant = 0 if new else stagnant + 1
            known |= new
            generation += 1
        return f"{STAGNANT_GENERATIONS} generations brought no new recipe"

    def _asked(self, generation: int, points: list[list[float]]) -> list[Candidate]:
        """The generation's candidates: as recorded, or recorded now."""
        genomes = [self.space.point(point) for point in points]
        recipes = [self._know(self.space.decode(genome)) for genome in genomes]
        if generation == len(self.state.generations):
            self._record(
                "asked",
                generation=generation,
                **({"round": self.round} if self.config.breeding.rounds > 1 else {}),
                candidates=[
                    {"genome": genome, "recipe": recipe.id}
                    for genome, recipe in zip(genomes, recipes, strict=True)
                ],
            )
        asked = self.state.generations[generation]
        if [candidate.recipe_id for candidate in asked] != [recipe.id for recipe in recipes]:
            raise CampaignError(
                f"{self.store.uri}: the optimizer does not repeat generation {generation} as recorded: "
                "another version of it, or of NumPy, ran before. Restore that environment, or start a "
                "campaign of another name"
            )
        return asked

    def _fitness_for_tell(self, number: int) -> list[float]:
        """Fitness in ask order; a failed candidate counts as the worst of its generation, or of all
        until then: a replay must not know of those that came later."""
        asked = self.state.generations[number]
        fitness = [self.state.fitness(candidate.recipe_id) for candidate in asked]
        known = [value for value in fitness if value is not None]
        if not known:
            known = [
                value
                for generation in self.state.generations[:number]
                for candidate in generation
                if (value := self.state.fitness(candidate.recipe_id)) is not None
            ]
        if not known:
            reason = self.state.evaluation(asked[0].recipe_id, "search").failed
            raise CampaignError(f"every candidate of a generation failed; the first: {reason}")
        return [min(known) if value is None else value for value in fitness]

    def _select(self) -> Candidate:
        best = self.state.best(self.config.search.evaluations)
        if best is None:
            raise CampaignError("no candidate could be evaluated")
        candidate, fitness = best
        self._record_once(
            "selected", recipe=candidate.recipe_id, genome=candidate.genome, fitness=fitness
        )
        return candidate

    def _record_once(self, kind: str, **content: Any) -> None:
        """Record a decision, unless it was recorded already since the campaign got its budget."""
        assert self._ledger is not None
        known = [record for record in self._ledger.since_begun() if record["kind"] == kind]
        if not known or any(known[-1][key] != value for key, value in content.items()):
            self._record(kind, **content)

    # -- the end -----------------------------------------------------------------------------

    def _judge(self, candidate: Candidate) -> Judgement:
        """Child and parents on the held-out items, all of them the same."""
        self.watcher.stage("held-out evaluation")
        child = self.recipes[candidate.recipe_id]
        self._evaluate([child, *self.parent_recipes.values()], "holdout")
        results = {
            name: self.state.evaluation(recipe.id, "holdout")
            for name, recipe in {"child": child, **self.parent_recipes}.items()
        }
        for name, evaluation in results.items():
            if evaluation.failed is not None:
                raise CampaignError(
                    f"the held-out evaluation of {name} failed: {evaluation.failed}"
                )
        return judge({name: evaluation.results for name, evaluation in results.items()},
                     self.config.objective)  # fmt: skip

    def _finish(self, candidate: Candidate, judgement: Judgement) -> dict[str, Any]:
        """Write and publish the child, then the report; the campaign's result."""
        assert self.pool is not None and self._ledger is not None
        recipe = self.recipes[candidate.recipe_id]
        measured = self._examine(recipe)
        self.watcher.stage("writing the child")
        known = [record for record in self._ledger.since_begun() if record["kind"] == "child"]
        written = Ending(
            self.store, recipe, self.inputs.parents, self.inputs.base, self.config.health
        ).write(
            self.pool,
            engine_gates(measured, self.config.health),
            lambda folder: self._record("child", recipe=recipe.id, folder=folder),
            known[-1]["folder"] if known else None,
        )
        health = summarize(written.gates, self.config.health, measured)
        target = self.store.substore(written.folder)
        self.watcher.stage("measuring the child")
        attribution = attribute_written(written.writer, self.pool)
        lineage = build_lineage(
            self.config,
            self.inputs,
            self.state,
            recipe,
            self.parent_recipes,
            candidate.genome,
            judgement,
            {"health": health}
            | written.weights.to_dict()
            | {"attribution": attribution["components"]},
        )
        lineage["search"] |= {
            "space": self.described,
            "ended": self.ended,
            "flat": self.flat.to_dict() if self.flat else None,
        }
        number = self.state.round_of_recipe(recipe.id)
        through, bred = bred_ancestors(
            lineage, self.rounds, number, candidate.genome, self.plan, self.recipes
        )
        if self.config.breeding.rounds > 1:
            lineage["search"]["rounds"] = rounds_for_lineage(self.state, self.config, number)
        add_ancestry(lineage, self.inputs.parents, self.inputs.base, through=through, bred=bred)
        files = {
            "README.md": build_card(lineage).encode(),
            ATTRIBUTION_FILE: lineage_bytes(attribution),
            LINEAGE_FILE: lineage_bytes(lineage),
        }
        # A record before each step that others see: a driver that was replaced stops here.
        self._record("publishing", recipe=recipe.id)
        written.writer.publish(files)
        open_checkpoint(target.uri)  # as any user would; raises if it is not one
        self.watcher.stage("writing the report")
        self._record(
            "rejected" if health["rejected"] else "finished",
            child=written.folder,
            recipe_id=recipe.id,
            evaluations=self.state.evaluated(self.config.search.evaluations),
            search_ended=self.ended,
            **judgement.to_dict(),
            gates={gate["name"]: gate["result"] for gate in health["gates"]},
            reasons=[
                f"{gate.name}: {gate.finding}"
                for gate in written.gates
                if gate.name in health["rejected"]
            ],
            report=REPORT_FILE,
        )
        write_report(self.store)
        self.watcher.notify(self)
        result = self._ledger.result()
        assert result is not None
        return result

    def _examine(self, recipe: Recipe) -> dict[str, Any]:
        """What the live child and parents do on the calibration texts and prompts."""
        assert self.pool is not None and self._ledger is not None
        shown = fingerprint(self.examination)
        for record in self._ledger.of_kind("examined"):
            if record["recipe"] == recipe.id and record["examination"] == shown:
                found: dict[str, Any] = record["measured"]
                return found
        self.watcher.stage("health check")
        parents = {name: parent.to_dict() for name, parent in self.parent_recipes.items()}
        given = (recipe.to_dict(), parents, self.examination)
        ((_, measured),) = self.pool.each("examine", [given])
        self._record("examined", recipe=recipe.id, examination=shown, measured=measured)
        return dict(measured)
