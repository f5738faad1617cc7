"""Errors that the driver foresees."""


class CampaignError(RuntimeError):
    """The campaign cannot go on, though its input was right."""
