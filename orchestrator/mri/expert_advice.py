"""What an expert space would take from a scan: the same prescription as a campaign's."""

from __future__ import annotations

from typing import Any

from orchestrator.mri.expert_prescription import prescribe_experts
from orchestrator.mri.prescription import LEAST_DISPERSION
from workers.errors import BadInputError


def expert_advice(scan: dict[str, Any]) -> dict[str, Any] | None:
    """How many experts have advised shares, how these spread, and their mean by donor.

    `problem` says why there are none. None without two parents whose experts were probed.
    """
    try:
        found = prescribe_experts(scan)
    except BadInputError as error:
        return {"problem": str(error)}
    donors = [parent["name"] for parent in scan["parents"]][1:]
    if not donors or not found.experts:
        return None
    shares = {
        donor: [
            share for layer in found.experts.values() for share in layer[donor] if share is not None
        ]
        for donor in donors
    }
    count = len(shares[donors[0]])
    return {
        "experts": count,
        "dispersion": found.dispersion,
        "is_telling": found.is_telling,
        "shares": {donor: sum(own) / count for donor, own in shares.items()} if count else {},
    }


def expert_advice_notes(found: dict[str, Any] | None) -> list[str]:
    """`expert_advice` in a line."""
    if found is None:
        return []
    if "problem" in found:
        return [f"advises no shares for experts: {found['problem']}"]
    line = (
        f"for an expert space: advises shares for {found['experts']} experts that spread by "
        f"{found['dispersion']:g}"
    )
    if not found["is_telling"]:
        return [f"{line}, less than {LEAST_DISPERSION}: it tells nothing"]
    means = ", ".join(f"{donor} {share:.2f}" for donor, share in found["shares"].items())
    return [f"{line}; on the mean {means}"]
