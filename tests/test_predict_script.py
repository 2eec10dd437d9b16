"""script/predict.py: images with and without EXIF, boxes from JSON, corrupt images, files that exist already."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import IFD, Base

from script import predict as script
from src.predict.boxes import HandBox, read_boxes
from src.predict.outputs import JSON, name_outputs
from src.predict.photo import GUESS, PhotoError, read_photo
from src.predict.predictor import Predictor
from src.utils.mesh_overlay import SIDE_RGB, Mesh, draw_meshes
from tests.helpers import REALHANDS, ROOT
from tests.test_predict import make_run, photograph

BOX = [40, 30, 110, 90]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


def save(path: Path, image: np.ndarray, exif: dict[int, object] | None = None, orientation: int = 1) -> Path:
    """Write an image with EXIF tags in the camera section."""
    tags = Image.Exif()
    tags[Base.Orientation] = orientation
    tags.get_ifd(IFD.Exif).update(exif or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, exif=tags, quality=95)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images and a text file."""
    for number, suffix in enumerate(("png", "jpg", "png")):
        save(tmp_path / "photos" / f"p{number}.{suffix}", photograph(number))
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def write_boxes(path: Path, *records: dict) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


def predict(*arguments: object) -> int:
    return script.main([str(a) for a in arguments])


def test_folder_with_boxes(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = write_boxes(
        tmp_path / "boxes.json",
        {"image": "p0.png", "bbox": BOX, "handedness": "left", "focal": [300, 310], "princpt": [100, 70], "note": "?"},
        {"image": "p0.png", "bbox": [90, 60, 150, 120], "handedness": "right", "focal": None},
        {"image": "photos/p1.jpg", "bbox": BOX},
        {"image": "elsewhere.jpg", "bbox": BOX},
    )
    assert predict(run, photos, "--boxes", boxes, "--output", tmp_path / "out") == script.DONE
    said = capsys.readouterr().out
    assert "warning" not in said
    for line in ("3 hands in 2 images predicted, 0 skipped", "camera of 1 hand from the boxes file"):
        assert line in said
    assert f"camera of 2 hands from {GUESS}" in said
    assert "1 hand assumed to be right" in said
    assert "no box for 1 image" in said
    assert "elsewhere.jpg" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("p0.json", "p0.npz", "p0_0_left.obj", "p0_1_right.obj", "p0_overlay.jpg"),
        *("p1.json", "p1.npz", "p1_0_right.obj", "p1_overlay.jpg"),
    ]
    check_files_agree(Predictor.load(run), photos, tmp_path / "out")


def check_files_agree(predictor: Predictor, photos: Path, out: Path) -> None:
    """JSON, npz and OBJ of p0 hold what `Predictor.predict` returns."""
    image = cv2.imread(str(photos / "p0.png"))[..., ::-1]
    hands = predictor.predict([image], [BOX], [300, 310], [100, 70], is_right=False)
    record, arrays = json.loads((out / "p0.json").read_text()), np.load(out / "p0.npz")
    assert record["image_wh"] == [201, 150]
    assert record["hand_model"] == "standin"
    assert record["step"] == 7
    left = record["hands"][0]
    assert left["handedness"] == "left"
    assert left["camera_from"] == "the boxes file"
    for name in ("joint_cam", "joint_img", "root_cam", "mano_pose", "mano_shape", "vert_cam"):
        assert np.allclose(arrays[name][0], getattr(hands, name)[0], atol=1e-2), name
        assert np.allclose(left[name], arrays[name][0], atol=1e-3), name
    assert arrays["is_right"].tolist() == [False, True]
    lines = (out / left["mesh"]).read_text().splitlines()
    vert = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    face = np.array([line.split()[1:] for line in lines if line.startswith("f ")], int) - 1
    assert np.allclose(vert * (1, -1, -1), arrays["vert_cam"][0], atol=1e-3)
    corner = vert[face]
    assert np.einsum("fc,fc->", corner[:, 0], np.cross(corner[:, 1], corner[:, 2])) > 0, "wound inwards"
    overlay = cv2.imread(str(out / "p0_overlay.jpg"))
    assert overlay.shape == image.shape
    assert np.abs(overlay[..., ::-1].astype(int) - image).max() > 50


def test_nothing_is_overwritten(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert predict(run, photos / "p0.png", "--output", out) == script.DONE
    assert "warning: no --boxes, so the whole image is treated as the crop of one hand; " in capsys.readouterr().out
    (out / "p0.json").write_text("mine")
    assert predict(run, photos, "--output", out) == script.WRONG_ARGUMENTS
    assert "outputs of 1 of 3 images already exist, e.g. " in (message := capsys.readouterr().err)
    assert "p0.json; choose --overwrite" in message
    assert predict(run, photos, "--output", out, "--skip_existing", "--write", "json") == script.DONE
    assert "2 hands in 2 images predicted, 0 skipped" in (said := capsys.readouterr().out)
    assert "1 image predicted earlier" in said
    assert (out / "p0.json").read_text() == "mine"
    assert not (out / "p1.npz").exists()
    assert predict(run, photos, "--output", out, "--overwrite", "--handedness", "left") == script.DONE
    assert json.loads((out / "p0.json").read_text())["hands"][0]["handedness"] == "left"
    assert [p.name for p in sorted(out.glob("p0*.obj"))] == ["p0_0_left.obj"], "the right hand's mesh was an older one"
    assert predict(run, photos, "--output", photos) == script.WRONG_ARGUMENTS


def test_corrupt_images_are_named_and_skipped(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cut.jpg").write_bytes((photos / "p1.jpg").read_bytes()[:-900])
    (photos / "text.jpg").write_text("<html>404</html>")
    (photos / "empty.png").write_bytes(b"")
    assert predict(run, photos, "--output", tmp_path / "out") == script.SKIPPED_SOME
    said = capsys.readouterr().out
    assert "warning: no --boxes, so each of the 6 whole images is treated as the crop of one hand; " in said
    for name in ("cut.jpg", "text.jpg", "empty.png"):
        assert f"{name}: " in said
        assert not list((tmp_path / "out").glob(f"{Path(name).stem}*"))
    assert "3 hands in 3 images predicted, 3 skipped" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "nowhere.jpg"], "nowhere.jpg: there is no such image or folder"),
        (["nowhere", "PHOTOS"], "no checkpoint at nowhere"),
        (["RUN", "PHOTOS", "--boxes", "nowhere.json"], "nowhere.json cannot be read"),
        (["RUN", "PHOTOS", "--boxes", "EMPTY"], "lists none of the images at PHOTOS: it is empty"),
        (["RUN", "PHOTOS", "--boxes", "OTHER"], "lists none of the images at PHOTOS: it lists x.jpg"),
        (["RUN", "PHOTOS", "--device", "quantum"], "--device quantum"),
        (["RUN", "PHOTOS", "--hand_model", "nowhere.pkl"], "nowhere.pkl: there is no such file"),
    ],
)
def test_wrong_arguments_are_reported(
    run: Path, photos: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": run, "PHOTOS": photos, "EMPTY": write_boxes(tmp_path / "empty.json")}
    names["OTHER"] = write_boxes(tmp_path / "other.json", {"image": "x.jpg", "bbox": BOX})
    assert predict(*(names.get(a, a) for a in arguments), "--output", tmp_path / "out") == script.WRONG_ARGUMENTS
    assert message.replace("PHOTOS", str(photos)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bbox": BOX}, "record 1: has no `image`"),
        ({"image": "p0.png"}, "record 1: has no `bbox`"),
        ({"image": "p0.png", "bbox": [100, 100, 50, 40]}, "not x, y, w, h"),
        ({"image": "p0.png", "bbox": [1, 2, 3]}, "must be 4 numbers"),
        ({"image": "p0.png", "bbox": [1, 2, 3, math.nan]}, "must be 4 numbers"),
        ({"image": "p0.png", "bbox": BOX, "handedness": "Left"}, '`handedness` must be "left" or "right"'),
        ({"image": "p0.png", "bbox": BOX, "focal": [0, 1]}, "`focal` .* must be positive"),
    ],
)
def test_invalid_boxes_are_reported(tmp_path: Path, record: dict, message: str) -> None:
    file = write_boxes(tmp_path / "boxes.json", {"image": "p0.png", "bbox": BOX}, record)
    with pytest.raises(ValueError, match=message):
        read_boxes(file, [tmp_path / "p0.png"])


@pytest.mark.skipif(not REALHANDS.is_dir(), reason=f"{REALHANDS} is not here")
def test_annotations_of_real_hands_can_be_used_as_boxes() -> None:
    photos = sorted((REALHANDS / "images").iterdir())
    boxes, unknown = read_boxes(REALHANDS / "annotations.json", photos)
    assert unknown == []
    assert sum(map(len, boxes.values())) == 157
    assert isinstance(boxes[photos[0]][0], HandBox)
    assert all(read_photo(photo).image.ndim == 3 for photo in photos[::20])


def test_exif_orientation_applies_to_image_boxes_and_camera(run: Path, tmp_path: Path) -> None:
    """A phone's image, stored rotated with orientation 6: everything refers to the upright image."""
    upright = photograph(5)
    stored = np.rot90(upright).copy()  # 90 degrees counterclockwise; orientation 6 rotates it back
    tags = {Base.FocalLengthIn35mmFilm: 26, Base.ExifImageWidth: 150, Base.ExifImageHeight: 201}
    turned = save(tmp_path / "in" / "turned.png", stored, tags, orientation=6)
    photo = read_photo(turned)
    assert np.array_equal(photo.image, upright)
    assert photo.camera.princpt == (100.0, 74.5)
    assert photo.camera.focal == pytest.approx([26 / math.hypot(36, 24) * math.hypot(201, 150)] * 2)
    assert photo.camera.source == "EXIF: 26 mm equivalent"
    boxes = write_boxes(tmp_path / "boxes.json", {"image": "in/turned.png", "bbox": BOX, "handedness": "right"})
    assert predict(run, turned, "--boxes", boxes, "--output", tmp_path / "out", "--write", "json") == script.DONE
    hand = json.loads((tmp_path / "out" / "turned.json").read_text())["hands"][0]
    expected = Predictor.load(run).predict([upright], [BOX], photo.camera.focal, photo.camera.princpt)
    assert np.allclose(hand["joint_img"], expected.joint_img[0], atol=1e-2)


@pytest.mark.parametrize(
    ("tags", "focal", "source"),
    [
        ({}, math.hypot(201, 150), GUESS),
        ({Base.FocalLength: 4.0}, math.hypot(201, 150), GUESS),
        ({Base.FocalLengthIn35mmFilm: 0, Base.FocalLength: 0.0}, math.hypot(201, 150), GUESS),
        ({Base.FocalLengthIn35mmFilm: 60000}, math.hypot(201, 150), f"{GUESS}; EXIF: 60000 mm .* not plausible"),
        # 5 mm lens; 4020 px of 1.5 um were downscaled to 201: the sensor is 6.03 mm wide
        (
            {
                Base.FocalLength: 5.0,
                Base.FocalPlaneXResolution: 10 / 0.0015,
                Base.FocalPlaneResolutionUnit: 3,
                Base.ExifImageWidth: 4020,
                Base.ExifImageHeight: 3000,
            },
            5.0 / 6.03 * 201,
            "EXIF: 5 mm, pixels of 30 um",
        ),
        (
            {Base.FocalLengthIn35mmFilm: 28, Base.ExifImageWidth: 4000, Base.ExifImageHeight: 2000},
            math.hypot(201, 150),
            "cropped after it was taken",
        ),
    ],
)
def test_camera_from_exif(tmp_path: Path, tags: dict, focal: float, source: str) -> None:
    photo = read_photo(save(tmp_path / "a.jpg", photograph(), tags))
    assert photo.camera.focal == pytest.approx([focal] * 2, rel=1e-3)
    assert source.split(" .* ")[0] in photo.camera.source
    assert source.split(" .* ")[-1] in photo.camera.source


def test_sensor_width_completes_the_focal_length(tmp_path: Path) -> None:
    photo = read_photo(save(tmp_path / "a.jpg", photograph(), {Base.FocalLength: 4.0}), sensor_width=6.4)
    assert photo.camera.focal[0] == pytest.approx(4.0 / 6.4 * 201)


def test_command_line_camera_has_precedence(run: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", photograph(), {Base.FocalLengthIn35mmFilm: 26})
    arguments = (run, tmp_path / "a.jpg", "--output", tmp_path / "out", "--focal", 250, "--princpt", 90, 80)
    assert predict(*arguments, "--write", "json") == script.DONE
    hand = json.loads((tmp_path / "out/a.json").read_text())["hands"][0]
    assert (hand["focal"], hand["princpt"], hand["camera_from"]) == ([250, 250], [90, 80], "the command line")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "I"])
def test_image_modes(tmp_path: Path, mode: str) -> None:
    grey = photograph()[..., 0]
    wide = {"I;16": np.uint16, "I": np.int32}.get(mode)  # 16-bit grey, the latter stored with 32 bits
    image = Image.fromarray(grey.astype(wide) << 8) if wide else Image.fromarray(grey).convert(mode)
    path = tmp_path / {"CMYK": "a.jpg", "I": "a.tif"}.get(mode, "a.png")
    image.save(path, quality=100)
    read = read_photo(path).image
    assert (read.dtype, read.shape) == (np.uint8, (*grey.shape, 3))
    assert np.abs(read.astype(int) - grey[..., None]).max() <= 4


@pytest.mark.parametrize("pixel", [photograph()[..., 0] / np.float32(255), photograph()[..., 0].astype(np.int32) << 20])
def test_images_of_unknown_white_level_are_refused(tmp_path: Path, pixel: np.ndarray) -> None:
    """Pillow would convert one to black and the other to white, and the network predicts a hand for either."""
    Image.fromarray(pixel).save(tmp_path / "a.tif")
    with pytest.raises(PhotoError, match="32 bits per pixel"):
        read_photo(tmp_path / "a.tif")


def test_no_two_images_share_their_outputs(tmp_path: Path) -> None:
    for names in (["a.jpg", "a.png", "a_jpg.png"], ["a_jpg_png.jpg", "a.jpg", "a.png", "a_jpg.png"]):
        outputs = name_outputs([Path(name) for name in names], tmp_path)
        assert list(outputs) == [Path(name) for name in names]
        assert len({each.file(JSON) for each in outputs.values()}) == len(names)
    plain = name_outputs([Path("a.jpg"), Path("b.c.jpg"), Path("b.c.png")], tmp_path)
    assert [each.name for each in plain.values()] == ["a", "b_c_jpg", "b_c_png"]


def test_truncated_image_is_an_error(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(photograph()).save(data, "JPEG")
    (tmp_path / "a.jpg").write_bytes(data.getvalue()[:-200])
    with pytest.raises(PhotoError, match="truncated"):
        read_photo(tmp_path / "a.jpg")


def test_overlay_is_where_the_camera_projects_it() -> None:
    """Two squares facing the camera: each in the colour of its side, at its pixels, the nearer one in front."""
    square = np.array([[-50.0, -50, 0], [50, -50, 0], [50, 50, 0], [-50, 50, 0]])
    face = np.array([[0, 2, 1], [0, 3, 2]])  # outward is towards the camera
    far, near = (
        Mesh(square + np.array([0, 0, 1000]), face, True),
        Mesh(0.5 * square + np.array([25, 0, 500]), face, False),
    )
    black = np.zeros((100, 120, 3), np.uint8)
    drawn = draw_meshes(black, [far, near], np.array([400.0, 400.0]), np.array([50.0, 50.0]))
    assert not black.any(), "the image is unchanged"
    rows, columns = np.nonzero(drawn.sum(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((30, 70, 30, 90), abs=1)

    def hue(row: int, column: int) -> np.ndarray:
        return drawn[row, column] / drawn[row, column].max()

    assert np.allclose(hue(50, 40), np.array(SIDE_RGB[True]) / max(SIDE_RGB[True]), atol=0.03)
    assert np.allclose(hue(50, 60), np.array(SIDE_RGB[False]) / max(SIDE_RGB[False]), atol=0.03)
    behind = draw_meshes(
        black, [Mesh(square - np.array([0, 0, 500]), face, True)], np.array([400.0, 400.0]), np.zeros(2)
    )
    assert not behind.any()


@pytest.mark.parametrize("is_right", [True, False])
def test_overlay_of_a_prediction_is_on_its_vertices(run: Path, is_right: bool) -> None:
    """The pixels that change are those where the camera sees the outside of the predicted mesh."""
    image = np.full((150, 201, 3), 60, np.uint8)
    hands = Predictor.load(run).predict([image], [BOX], 300, [100, 70], is_right=is_right)
    mesh = Mesh(hands.vert_cam[0], hands.faces_of(0), is_right)
    drawn = draw_meshes(image, [mesh], hands.focal[0], hands.princpt[0])
    point = hands.vert_cam[0, :, :2] / hands.vert_cam[0, :, 2:] * hands.focal[0] + hands.princpt[0]
    rows, columns = np.nonzero((drawn != image).any(axis=-1))
    found = (columns.min(), rows.min(), columns.max(), rows.max())
    assert found == pytest.approx(
        (*np.clip(point.min(axis=0), 0, None), *np.minimum(point.max(axis=0), (200, 149))), abs=1.5
    )
    joint = np.rint(hands.joint_img[0]).astype(int)
    inside = ((joint >= 0) & (joint < (201, 150))).all(axis=1)
    assert inside.sum() > 10
    assert (drawn != image).any(axis=-1)[tuple(joint[inside].T[::-1])].mean() > 0.9
    colour = drawn[rows, columns].mean(axis=0)
    assert (colour[0] > colour[2]) == is_right, "warm or cool, where the dark inside is neither"
    assert abs(colour[0] - colour[2]) > 30


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; sys.argv = ['predict.py', '--help']\n"
        "try: runpy.run_path('script/predict.py', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'cv2'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--boxes" in done.stdout
