"""Errors that the driver foresees."""


class CampaignError(RuntimeError):
    """The campaign cannot go on, though its input was right."""


class ClusterError(CampaignError):
    """A cluster does not answer, or does not do what it is asked for."""


class PoolError(RuntimeError):
    """Workers cannot be started, or keep failing."""


class EngineMismatchError(RuntimeError):
    """A worker would score differently from those before it."""


def all_failed(what: str, reason: str | None) -> CampaignError:
    """No candidate has a score that the others could be told beside."""
    return CampaignError(f"every candidate {what} failed; the first: {reason}")


def not_repeated(uri: str, what: str) -> CampaignError:
    """The replay of the ledger came to another candidate than the one that is recorded."""
    return CampaignError(
        f"{uri}: the optimizer does not repeat {what} as recorded: another version of it, or of NumPy, ran "
        "before. Restore that environment, or start a campaign of another name"
    )
