"""Plausibility checks of a whole shard, and of the data of a run when it starts."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

from src.data.dataset import HandDataset
from src.data.order.plan import MixedPlan
from src.data.plausibility.hands import read_hands, spread_rows
from src.data.plausibility.mano import HandModels, models_of
from src.data.plausibility.tally import Tallies, coverage, findings, tally
from src.data.shards.index import ShardIndex
from src.data.shards.reader import ShardReader

logger = logging.getLogger("stage1.data")  # below the logger of src/utils/console.py
_MOST_OF_SHARD = 256
_MOST_OF_TRAINING = 2000  # positions of the order, as many as the mean hand has just read: they are in the page cache
_MOST_OF_VALIDATION = 500  # they are in random order, so each is a disk access that validation then saves


def check_hands_of_shard(shard: ShardIndex, mano: Path | None) -> tuple[Tallies, list[str]]:
    """Judge up to 256 evenly spaced hands of a shard.

    Args: mano: the user's MANO file, to compare MANO parameters with the joints.
    Returns: the counts, and the hand models whose parameters could not be compared.
    Raises: ValueError, OSError: the MANO file cannot be used.
    """
    hands = read_hands([shard], [spread_rows(shard.num_frame(), _MOST_OF_SHARD)])
    if hands is None:
        return {}, []
    models = models_of(hands, mano)
    missing = set(hands.hand_model[hands.has_mano].tolist()) - models.keys()
    return tally(hands, models, lambda _, row: _describe(shard, 1, row)), sorted(missing)


def check_hands_of_run(dataset: HandDataset, models: HandModels) -> Tallies:
    """Judge hands at the first positions of the data order, which are spread over all shards."""
    most = _MOST_OF_TRAINING if isinstance(dataset.plan, MixedPlan) else _MOST_OF_VALIDATION
    rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in sorted({dataset.plan.locate(position) for position in range(min(most, len(dataset)))}):
        rows_of[place.source, place.shard].append(place.row)
    indexes, rows = [dataset.sources[source][shard] for source, shard in rows_of], list(rows_of.values())
    hands = read_hands(indexes, rows, dataset.stride)
    if hands is None:
        return {}
    return tally(hands, models, lambda shard, row: _describe(indexes[shard], dataset.stride, row))


def _describe(shard: ShardIndex, stride: int, row: int) -> str:
    """ "<key>/<frame> in <shard>" for an example."""
    reader = ShardReader(shard, stride)
    key = reader.describe(row)
    reader.close()
    return f"{key} in {shard.shard}"


def warn_if_implausible(name: str, dataset: HandDataset, models: HandModels) -> None:
    """Log a warning for each finding in the first positions of a data set. A fault of the check itself is logged, too:
    it must not keep a run from starting."""
    try:
        tallies = check_hands_of_run(dataset, models)
        lines = findings(tallies)
    except Exception as error:
        logger.warning(f"{name} data: the plausibility check failed and was skipped: {type(error).__name__}: {error}")
        return
    for line in coverage(tallies):
        logger.info(f"{name} data: {line}")
    for line in lines:
        logger.warning(f"{name} data: {line}")
    if lines:
        logger.warning(f'{name} data is used as it is; see "Plausibility" in docs/DATA.md')
