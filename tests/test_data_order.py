"""The order of training and validation does not depend on workers, ranks, resumes or how frames are packed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from src.batch import Batch
from src.data.health import BadDataError, merge_states
from src.data.loader import build_train_loader, build_val_loader
from src.data.order.plan import HALVES, EpochOrder, MixedPlan, SourcePlan, validation_plan
from src.data.order.spacing import distance
from src.data.shards.build_index import open_indexes
from tests.data_shards import data_config, lab_sample, native_sample, write_shard

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training shards (clips of 1, 3 and 5 frames, both formats) and a validation shard."""
    root = tmp_path_factory.mktemp("shards")
    write_shard(root / "train" / "0.tar", [native_sample(n, 1 + n % 2 * 4) for n in range(6)])
    write_shard(root / "train" / "1.tar", [lab_sample(n, 3, 1 + n % 2) for n in range(10, 17)])
    write_shard(root / "val" / "0.tar", [native_sample(n, 1 + n % 2 * 2) for n in range(20, 29)])
    return root


def same(a: Batch, b: Batch) -> bool:
    tensors = (name for name, value in vars(a).items() if isinstance(value, torch.Tensor))
    return a.key == b.key and a.source == b.source and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


def train(root: Path, num_batch: int = 8, done: int = 0, rank: int = 0, world: int = 1, **knob) -> list[Batch]:
    cfg = data_config(root, **knob)
    start, rest = done * world * cfg.TRAIN.sample_per_device, num_batch - done
    return list(build_train_loader(cfg, "mano", start=start, num_batch=rest, rank=rank, world_size=world))


def test_order_and_pixels_do_not_depend_on_workers_ranks_or_resumes(root: Path) -> None:
    straight = train(root, sample_per_device=8)
    assert len(straight) == 8
    for worker in (1, 2, 3):  # two shards only: fewer than workers
        assert all(
            same(a, b) for a, b in zip(straight, train(root, sample_per_device=8, num_worker=worker), strict=True)
        )
    assert all(
        same(a, b) for a, b in zip(straight[5:], train(root, done=5, sample_per_device=8, num_worker=2), strict=True)
    )
    for world in (2, 4):
        ranks = [train(root, rank=rank, world=world, sample_per_device=8 // world) for rank in range(world)]
        keys = [[key for batch in step for key in batch.key] for step in zip(*ranks)]
        assert keys == [batch.key for batch in straight]
        assert all(torch.equal(torch.cat([b.patch for b in s]), a.patch) for s, a in zip(zip(*ranks), straight))
    other = train(root, sample_per_device=8, seed=4)
    assert [b.key for b in other] != [b.key for b in straight]
    positions = torch.cat([b.position for b in straight]).tolist()
    assert positions == list(range(64))


def test_an_epoch_has_every_frame_once(root: Path) -> None:
    num_frame = 3 * 1 + 3 * 5 + 7 * 3
    batches = train(root, num_batch=2 * num_frame, sample_per_device=1)
    keys = [b.key[0] for b in batches]
    assert len(set(keys[:num_frame])) == len(set(keys[num_frame:])) == num_frame
    assert keys[:num_frame] != keys[num_frame:]
    assert not torch.equal(batches[0].patch, batches[num_frame + keys[num_frame:].index(keys[0])].patch)
    assert len({b.key[0] for b in train(root, num_batch=100, sample_per_device=1, stride=2)}) == 3 * 1 + 3 * 3 + 7 * 2


def guaranteed_window(order: EpochOrder) -> int:
    """Successive positions without neighbours that the block length and the step between rounds guarantee."""
    round_size = max(1, int(np.diff(order.group_block).min()) - 1)  # the last block may be shorter
    return min(1024, max(0, distance(order.block, order.rounds.step) - 1) * round_size + 1)


@pytest.mark.parametrize("num_frame", [1, 2, 3, 17, 100, 500, 2000, 12_000, 20_000, 70_000])
def test_neighbours_stay_apart_within_and_across_epochs(num_frame: int) -> None:
    epochs = [EpochOrder(num_frame, seed=1, epoch=e, frame_size=45_000) for e in range(4)]
    orders = np.array([[epoch.frame(i) for i in range(num_frame)] for epoch in epochs])
    assert all(sorted(order) == list(range(num_frame)) for order in orders.tolist())
    place = np.argsort(orders, axis=1) + num_frame * np.arange(4)[:, None]  # [epoch, frame], over all epochs
    beside = [(a, b) for a in range(4) for b in range(4) if abs(a - b) < 2]
    nearest = min(np.abs(place[b, 1:] - place[a, :-1]).min(initial=num_frame) for a, b in beside)
    again = np.diff(place, axis=0).min()  # the same frame, in the next epoch
    window = min(guaranteed_window(epoch) for epoch in epochs)
    assert min(nearest, again) >= window
    assert window >= min(1024, 0.35 * num_frame) or num_frame < 100
    if num_frame >= 500:
        assert (orders[0] != orders[1]).any()
        assert abs(orders[0][: num_frame // 2].mean() / num_frame - 0.5) < 0.03


def test_batches_are_composed_differently_in_each_epoch() -> None:
    partners = []
    for epoch in range(4):
        order = EpochOrder(20_000, seed=2, epoch=epoch)
        frames = [order.frame(i) for i in range(20_000)]
        at = frames.index(777) // 256 * 256
        partners.append(set(frames[at : at + 256]))
    assert max(len(a & b) for i, a in enumerate(partners) for b in partners[:i]) < 160


def test_a_batch_has_no_neighbouring_frames(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "0.tar", [native_sample(n, 10) for n in range(30)])
    for batch in train(tmp_path, num_batch=60, sample_per_device=8):
        clips: dict[str, list[int]] = {}
        for key in batch.key:
            clip, frame = key.split("/")
            clips.setdefault(clip, []).append(int(frame))
        for frames in clips.values():
            assert np.diff(sorted(frames)).min(initial=2) > 1


def test_an_order_of_twenty_million_frames_starts_immediately() -> None:
    order = EpochOrder(20_000_000, seed=1, epoch=7)
    assert order.block_order.nbytes < 1 << 20
    places = [order.frame(19_999_000 + i) for i in range(1000)]
    assert len(set(places)) == 1000
    assert max(places) < 20_000_000


def test_sources_are_mixed_by_weight_at_every_position(root: Path) -> None:
    source = {
        "clips": {"source": ["train/0.tar"], "weight": 3.0},
        "labs": {"source": ["train/1.tar"], "weight": 1.0},
        "more": {"source": ["val/0.tar"], "weight": 4.0},
    }
    indexes = [open_indexes([root / s["source"][0]]) for s in source.values()]
    plans = [SourcePlan(shards, 1, 0, tag) for tag, shards in enumerate(indexes)]
    plan = MixedPlan(plans, [s["weight"] for s in source.values()], seed=5)
    drawn = [plan.source_at(position) for position in range(4000)]
    for end in (8, 80, 4000):
        count = Counter(s for s, _ in drawn[:end])
        assert all(abs(count[i] - end * w / 8) < 3 for i, w in enumerate((3, 1, 4)))
    for i in range(3):
        assert [place for s, place in drawn if s == i] == list(range(sum(s == i for s, _ in drawn)))
    batches = train(root, train=source, num_batch=10, sample_per_device=8)
    assert all(
        same(a, b) for a, b in zip(batches, train(root, train=source, num_batch=10, sample_per_device=8, num_worker=2))
    )


def validation(root: Path, world: int = 1, **knob) -> list[tuple[str, torch.Tensor]]:
    """(key, patch) of every real row, in order of position, over all ranks."""
    rows = {}
    for rank in range(world):
        loader = build_val_loader(data_config(root, **knob), "mano", rank=rank, world_size=world)
        sizes = set()
        for batch in loader:
            sizes.add(len(batch))
            for i, position in enumerate(batch.position.tolist()):
                if position >= 0:
                    assert position not in rows
                    rows[position] = (batch.key[i], batch.patch[i])
                else:
                    assert not batch.joint_2d_valid[i].any()
        assert sizes == {knob.get("sample_per_device", 4)}
    assert sorted(rows) == list(range(len(rows)))
    return [rows[position] for position in sorted(rows)]


def test_validation_is_the_same_for_any_workers_ranks_and_packing(root: Path, tmp_path: Path) -> None:
    samples = [native_sample(n, 1 + n % 2 * 2) for n in range(20, 29)]
    for i, sample in enumerate(samples[::-1]):
        write_shard(tmp_path / "val" / f"{i}.tar", [sample])
    for max_sample in (7, None):
        straight = validation(root, max_sample=max_sample)
        assert len(straight) == (max_sample or 17)
        variants = [{"num_worker": 1}, {"num_worker": 3}, {"world": 2}, {"world": 3, "num_worker": 1}]
        others = [validation(root, max_sample=max_sample, **variant) for variant in variants]
        others += [
            validation(tmp_path, max_sample=max_sample),
            validation(root, max_sample=max_sample, sample_per_device=5),
        ]
        for other in others:
            assert [key for key, _ in other] == [key for key, _ in straight]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(other, straight))
    everything = [key for key, _ in validation(root)]
    assert [key for key, _ in validation(root, max_sample=7)] == everything[:7]
    assert [key for key, _ in validation(root, val_seed=43)] != everything
    indexes = open_indexes([root / "val" / "0.tar"])
    assert validation_plan(indexes, 1, 42, 7).num_frame == 7


def test_halves_split_the_samples_by_key(root: Path, tmp_path: Path) -> None:
    """The halves partition the samples, never split a clip, and do not depend on packing or seed."""
    samples = [native_sample(n, 1 + n % 2 * 2) for n in range(20, 60)]
    for folder, order in (("one", samples), ("two", samples[::-1])):
        for i in range(0, 40, 8):
            write_shard(tmp_path / folder / f"{i}.tar", order[i : i + 8])
    shards = {name: open_indexes(sorted((tmp_path / name).glob("*.tar"))) for name in ("one", "two")}

    def keys(packing: str, half: str | None, seed: int = 42, max_sample: int | None = None) -> list[tuple[int, int]]:
        plan = validation_plan(shards[packing], 1, seed, max_sample, half)
        tables = [index.tables() for index in shards[packing]]
        rows = [(tables[place.shard], tables[place.shard].frame[place.row]) for place in plan.places]
        return [(int(table.sample["key_hash"][row["sample"]]), int(row["frame"])) for table, row in rows]

    a, b, every = keys("one", "a"), keys("one", "b"), keys("one", None)
    assert sorted(a + b) == sorted(every)
    assert a == [key for key in every if key in set(a)], "in the order of the whole"
    assert not {key for key, _ in a} & {key for key, _ in b}
    assert 10 <= len({key for key, _ in a}) <= 30
    assert keys("two", "a") == a
    assert sorted(keys("one", "a", seed=7)) == sorted(a)
    assert keys("one", "a", max_sample=5) == a[:5]
    write_shard(tmp_path / "val" / "0.tar", samples[:1])
    alone = open_indexes([tmp_path / "val" / "0.tar"])
    absent = next(half for half in HALVES if not validation_plan(alone, 1, 42, None, half).places)
    with pytest.raises(ValueError, match=f"no sample is in half {absent}"):
        build_val_loader(data_config(tmp_path), "mano", half=absent)


def test_the_validation_loader_can_be_iterated_again(root: Path) -> None:
    loader = build_val_loader(data_config(root, num_worker=1), "mano")
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 5
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_bad_frames_are_counted_in_the_main_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [native_sample(n) for n in range(9)]
    bad = {**native_sample(9), "png": native_sample(9)["png"][:60] + bytes(40)}  # a png header without an image
    write_shard(tmp_path / "train" / "0.tar", [*good, bad])
    for worker in (0, 2):
        loader = build_train_loader(
            data_config(tmp_path, max_bad_fraction=0.5, num_worker=worker), "mano", num_batch=10
        )
        keys = [key for batch in loader for key in batch.key]
        assert len(keys) == 40
        assert "00009/0" not in keys
        assert loader.health.read["undecodable_image"] >= 4
        assert "00009/0" in loader.health.table()
        state = loader.health.state_dict()
        loader.health.load_state_dict(state)
        assert loader.health.state_dict() == state
        both = merge_states([state, state])
        assert (both["num_read"], both["read"]) == (80, {"undecodable_image": 2 * loader.health.read.total()})
        logged = [record.getMessage() for record in caplog.records if record.name == "stage1.data"]
        assert len(logged) == len(state["example"]) == min(20, loader.health.read.total())
        assert len(both["example"]) == min(20, 2 * len(logged))
        for line, example in zip(logged, state["example"], strict=True):
            assert line.endswith(example)
            assert f"00009/0 in {tmp_path / 'train' / '0.tar'}, at position" in example
        caplog.clear()


@pytest.mark.parametrize("worker", [0, 2])
def test_too_many_bad_frames_stop_the_run_with_a_table(tmp_path: Path, worker: int) -> None:
    bad = {**native_sample(9), "png": native_sample(9)["png"][:60] + bytes(40)}
    write_shard(tmp_path / "train" / "0.tar", [*(native_sample(n) for n in range(9)), bad])
    loader = build_train_loader(data_config(tmp_path, num_worker=worker), "mano", num_batch=100)
    with pytest.raises(BadDataError, match=r"DATA\.max_bad_fraction=0\.01") as caught:
        list(loader)
    assert 10 < loader.health.num_read < 200  # more than ten bad frames: 1 % of the first thousand
    for part in ("undecodable_image", "00009/0", str(tmp_path / "train" / "0.tar"), "at position"):
        assert part in str(caught.value)
    assert loader.health.counts() == {"undecodable_image": loader.health.read.total()}


def test_a_source_without_usable_frames_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").touch()
    with pytest.raises(ValueError, match=r"DATA\.train\.source"):
        build_train_loader(data_config(tmp_path), "mano")
