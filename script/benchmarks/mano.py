"""`script/bench.py mano`: the hand layer at 778 vertices, forward and backward, on this machine's device.

Times hardly depend on the arrays' values: random arrays of MANO's sizes replace the model file. Each time is the
minimum of many calls, includes the conversion of the pose to rotations, and on a GPU waits for the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from script.benchmarks.measurement import Figure, Status, seconds_per_call, wait_for_gpu
from src.hand.mano import ManoLayer
from src.hand.skeleton import MANO_TIP_VERTEX_IDS, NUM_MANO_VERTEX, HandArrays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--batch", type=int, default=256, help="hands at once (default 256)")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default 10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure the forward pass, alone and with two losses."""
    status(f"{args.batch} hands of {NUM_MANO_VERTEX} vertices")
    works = _works(args.batch, args.device)
    times = seconds_per_call(list(works.values()), args.seconds, num=1)
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    note = f"batch {args.batch}, {NUM_MANO_VERTEX} vertices, float32, {threads}"
    figures = [Figure(name, 1000 * seconds, "ms", note=note) for name, seconds in zip(works, times, strict=True)]
    rate = args.batch / times[-1]
    return [*figures, Figure("rate with a loss on vertices and joints", rate, "hands/s", note="forward and backward")]


def random_arrays() -> HandArrays:
    """Random arrays with MANO's sizes and magnitudes."""
    rng, num = np.random.default_rng(0), NUM_MANO_VERTEX
    weights, regressor = rng.random((num, 16)) ** 8, rng.random((16, num)) ** 8
    return HandArrays(
        name="noise",
        v_template=rng.normal(0, 0.05, (num, 3)),
        shapedirs=rng.normal(0, 0.005, (num, 3, 10)),
        posedirs=rng.normal(0, 0.002, (num, 3, 135)),
        joint_regressor=regressor / regressor.sum(axis=1, keepdims=True),
        skin_weights=weights / weights.sum(axis=1, keepdims=True),
        faces=rng.integers(0, num, (1538, 3)),
        mean_pose=rng.normal(0, 0.3, 45),
        tip_vertex_ids=MANO_TIP_VERTEX_IDS,
    )


def _works(batch: int, device: str) -> dict[str, Callable[[int], None]]:
    """The timed functions by name."""
    layer = ManoLayer(random_arrays()).to(device)
    pose, shape = 0.4 * torch.randn(batch, 48, device=device), torch.randn(batch, 10, device=device)

    @torch.no_grad()
    def forward(_: int) -> None:
        layer(layer.pose_to_rotmat(pose, False), shape)
        wait_for_gpu()

    def both(_: int, with_vertices: bool) -> None:
        leaf, beta = pose.clone().requires_grad_(), shape.clone().requires_grad_()
        out = layer(layer.pose_to_rotmat(leaf, False), beta)
        loss = out.joint.square().mean() + (out.vert.square().mean() if with_vertices else 0.0)
        loss.backward()
        wait_for_gpu()

    return {
        "forward, vertices and joints": forward,
        "forward and backward, loss on joints": partial(both, with_vertices=False),
        "forward and backward, loss on vertices and joints": partial(both, with_vertices=True),
    }
