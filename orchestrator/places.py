"""Places of parents as users name them: a checkpoint, or a campaign, which means its published child.

Workers know nothing of campaigns, so a place is resolved here before any of them sees it.
"""

from __future__ import annotations

from orchestrator.ledger.ledger import FOLDER, Ledger
from orchestrator.ledger.record_shapes import campaign_records
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.checkpoints.opening import split_adapter
from workers.errors import BadInputError
from workers.storage.hub import HUB_SCHEME
from workers.storage.locations import find_location, open_store


def open_parent(location: str) -> Checkpoint:
    """Open the checkpoint, or the child of the campaign, at `location`; an adapter may follow either.

    Raises `BadInputError` as `open_checkpoint` does, and for a campaign that has no child.
    """
    return open_checkpoint(resolve(location))


def resolve(location: str) -> str:
    """The checkpoint that `location` means: `STORE/CAMPAIGN` is the place of that campaign's child.

    Raises `BadInputError` for a campaign that is not finished, or whose child was rejected.
    """
    sides = split_adapter(location)
    if sides is not None:
        return f"{resolve(sides[0])}+{sides[1]}"
    found = find_location(location)
    if found.startswith(HUB_SCHEME):
        return location
    store = open_store(found)
    if next(store.list_objects(f"{FOLDER}/"), None) is None:
        return location
    result = Ledger(store, lambda record: None, campaign_records()).result()  # no items are wanted
    if result is None:
        raise BadInputError(
            f"{location}: this campaign is not finished, so it has no child yet; run `darwin run` with "
            "its campaign file again, or name a checkpoint"
        )
    child: str = result["child"]
    if result["status"] == "rejected":
        raise BadInputError(
            f"{location}: this campaign's child was rejected, so it has none that could be a parent; its "
            f"report says why. Whoever wants it nevertheless names its folder, {child}"
        )
    return child
