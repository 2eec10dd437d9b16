"""Drawing for overlays: skeletons over patches, sheets of patches side by side. uint8 RGB throughout."""

from __future__ import annotations

import cv2
import numpy as np

from src.batch import Batch, Prediction
from src.hand.skeleton import BONES
from src.utils.mesh_overlay import Mesh, draw_meshes

# thumb, index, middle, ring, pinky: the same hue per finger in every image of the project
FINGER_RGB = ((235, 80, 70), (240, 180, 40), (80, 190, 90), (60, 150, 235), (180, 90, 220))
SUBPIXEL_BITS = 4


def draw_skeleton(image: np.ndarray, joint: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """A copy of the image with the hand's bones and joints drawn over it.

    Args:
        image: [H, W, 3] uint8; joint: [21, 2] px of this image; valid: [21]; None draws all joints.
    """
    out = np.ascontiguousarray(image).copy()
    valid = np.ones(len(joint)) if valid is None else valid
    width = max(1, round(max(image.shape[:2]) / 110))
    draw = {"lineType": cv2.LINE_AA, "shift": SUBPIXEL_BITS}
    point = np.clip(np.round(np.nan_to_num(joint) * (1 << SUBPIXEL_BITS)), -(2**30), 2**30).astype(int).tolist()
    for parent, child in BONES:
        if valid[parent] and valid[child]:
            colour = FINGER_RGB[(child - 1) // 4]
            cv2.line(out, point[parent], point[child], colour, width, **draw)
    for index in np.flatnonzero(valid):
        colour = FINGER_RGB[(index - 1) // 4] if index else (255, 255, 255)
        cv2.circle(out, point[index], (width + 1) << SUBPIXEL_BITS, colour, -1, **draw)
    return out


def tile(images: list[np.ndarray], num_column: int) -> np.ndarray:
    """Images of one size on a grid, row by row; unused cells are dark."""
    cells = images + [np.full_like(images[0], 24)] * (-len(images) % num_column)
    rows = [np.concatenate(cells[i : i + num_column], axis=1) for i in range(0, len(cells), num_column)]
    return np.concatenate(rows)


def overlay_sheet(batch: Batch, prediction: Prediction, faces: np.ndarray) -> np.ndarray:
    """Patch, target, prediction and predicted mesh of a batch's first n <= 8 samples, one column each:
    [4 * 224, n * 224, 3].

    faces [F, 3] are those of the hand model. Padding rows, at the end of a batch, are skipped unless it has no others.
    """
    num_sample, side = max(1, min(8, int((batch.position >= 0).sum()))), 224
    scale = side / batch.patch.shape[-1]
    patches = batch.patch[:num_sample].permute(0, 2, 3, 1).cpu().numpy()
    patches = [cv2.resize(patch, (side, side), interpolation=cv2.INTER_LINEAR) for patch in patches]

    def skeletons(joint: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
        points = (joint + 0.5) * scale - 0.5
        return [draw_skeleton(*args) for args in zip(patches, points, valid, strict=True)]

    target_valid = batch.joint_2d_valid[:num_sample].cpu().numpy()
    target = skeletons(batch.joint_patch[:num_sample].cpu().numpy(), target_valid)
    guess = skeletons(prediction.joint_patch[:num_sample].detach().cpu().numpy(), np.ones_like(target_valid))
    camera = (batch.patch_focal * scale, (batch.patch_princpt + 0.5) * scale - 0.5)
    views = zip(patches, *(v[:num_sample].detach().float().cpu().numpy() for v in (prediction.vert_cam, *camera)))
    meshes = [draw_meshes(patch, [Mesh(vert, faces, True)], *view) for patch, vert, *view in views]
    return tile(patches + target + guess + meshes, num_sample)
