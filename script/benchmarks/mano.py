"""`script/bench.py mano`: the hand layer at 778 vertices, forward and backward, on this machine's device.

Times say little about the arrays, so the hand is one of random arrays of MANO's sizes and no file is needed. Each time
is the least of many calls, pose to rotations included; on a GPU the device is waited for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from script.benchmarks.measurement import Figure, seconds_per_call
from src.hand.mano import ManoLayer
from src.hand.skeleton import MANO_PARENTS, MANO_TIP_VERTEX_IDS, NUM_MANO_VERTEX, HandArrays

Work = Callable[[int], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--batch", type=int, default=256, help="hands at once (default 256)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default 10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Measure everything; `say` is told what is going on."""
    say(f"{args.batch} hands of {NUM_MANO_VERTEX} vertices")
    layer = ManoLayer(random_arrays()).to(args.device)
    works = _works(layer, args.batch)
    times = seconds_per_call(list(works.values()), args.seconds, num=1)
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    note = f"batch {args.batch}, {NUM_MANO_VERTEX} vertices, float32, {threads}"
    figures = [Figure(name, 1000 * seconds, "ms", note=note) for name, seconds in zip(works, times, strict=True)]
    rate = args.batch / times[-1]
    return [*figures, Figure("rate with a loss on vertices and joints", rate, "hands/s", note="forward and backward")]


def random_arrays(seed: int = 0) -> HandArrays:
    """A hand of noise with MANO's sizes and magnitudes."""
    rng, num = np.random.default_rng(seed), NUM_MANO_VERTEX
    weights, regressor = rng.random((num, 16)) ** 8, rng.random((16, num)) ** 8
    return HandArrays(
        name="noise",
        v_template=rng.normal(0, 0.05, (num, 3)),
        shapedirs=rng.normal(0, 0.005, (num, 3, 10)),
        posedirs=rng.normal(0, 0.002, (num, 3, 135)),
        joint_regressor=regressor / regressor.sum(axis=1, keepdims=True),
        skin_weights=weights / weights.sum(axis=1, keepdims=True),
        faces=rng.integers(0, num, (1538, 3)),
        parents=MANO_PARENTS,
        mean_pose=rng.normal(0, 0.3, 45),
        tip_vertex_ids=MANO_TIP_VERTEX_IDS,
    )


def _works(layer: ManoLayer, batch: int) -> dict[str, Work]:
    """What is timed, by name."""
    device = layer.faces.device
    generator = torch.Generator().manual_seed(0)
    pose = (0.4 * torch.randn(batch, 48, generator=generator)).to(device)
    shape = torch.randn(batch, 10, generator=generator).to(device)

    def finish(value: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value

    @torch.no_grad()
    def forward(_: int) -> object:
        return finish(layer(layer.pose_to_rotmat(pose, False), shape).vert)

    def both(with_vertices: bool) -> Work:
        def work(_: int) -> object:
            leaf, beta = pose.clone().requires_grad_(), shape.clone().requires_grad_()
            out = layer(layer.pose_to_rotmat(leaf, False), beta)
            loss = out.joint.square().mean() + (out.vert.square().mean() if with_vertices else 0.0)
            loss.backward()
            return finish(leaf.grad)

        return work

    return {
        "forward, vertices and joints": forward,
        "forward and backward, loss on joints": both(False),
        "forward and backward, loss on vertices and joints": both(True),
    }
