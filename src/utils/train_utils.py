"""Schedules: pure functions of the optimizer step, so a resumed run has no state to restore."""

from __future__ import annotations

import math

DROPOUT_SCHEDULES = ("gate", "linear", "cosine")


def get_progressive_dropout(
    step: int, total_steps: int, warmup_steps: int, target_dropout: float, schedule: str = "gate"
) -> float:
    """The dropout rate of one optimizer step.

    The rate is 0 for the first `warmup_steps` steps: DINOv2's features are robust, and dropout in the decoder hinders
    their adaptation while the decoder still changes fast. Then it is `target_dropout` immediately (`gate`), or rises to
    it by the last step along a straight line (`linear`) or half a cosine (`cosine`).

    Args:
        step: optimizer steps already done, from 0; a step past `total_steps` keeps the last rate.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps without dropout; 0 starts with dropout immediately.
        target_dropout: rate in [0, 1) that the schedule ends at.
        schedule: `gate`, `linear` or `cosine`.

    Raises:
        ValueError: for a negative step count, a rate outside [0, 1) or an unknown schedule.
    """
    if step < 0 or total_steps < 1 or warmup_steps < 0:
        raise ValueError(f"steps must not be negative: {step=}, {total_steps=} (at least 1), {warmup_steps=}")
    if not 0.0 <= target_dropout < 1.0:
        raise ValueError(f"MODEL.handec.dropout={target_dropout}: must be in [0, 1), e.g. 0.1")
    if schedule not in DROPOUT_SCHEDULES:
        raise ValueError(f"GENERAL.dropout_schedule={schedule}: choose one of {', '.join(DROPOUT_SCHEDULES)}")
    if step < warmup_steps:
        return 0.0
    if schedule == "gate":
        return target_dropout
    progress = min(1.0, (step - warmup_steps + 1) / max(1, total_steps - warmup_steps))
    return target_dropout * (progress if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress))


def get_lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor of the peak learning rates: linear warm-up from 1/warmup_steps to 1, then cosine to 0.

    Args:
        step: optimizer steps already done, from 0. The factor of the last step of the run is just above 0.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of the warm-up; 0 starts at the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
