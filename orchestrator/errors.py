"""Errors that the driver foresees."""


class CampaignError(RuntimeError):
    """The campaign cannot go on, though its input was right."""


class PoolError(RuntimeError):
    """Workers cannot be started, or keep failing."""


class EngineMismatchError(RuntimeError):
    """A worker would score differently from those before it."""
