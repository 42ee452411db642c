"""From files to pixels and labels, compared with PIL and torchvision on the same folder."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.datasets import ImageFolder, imagenet
from torchvision.transforms import CenterCrop, Compose, Resize

from fast_spatial.errors import UserError
from fast_spatial.kernels.layout import Colour, Geometry, Header
from fast_spatial.kernels.sampling import EVALUATION, Augmentation, Views, draw_image, pack_key
from fast_spatial.pipelines.dataset import ImageIndex, check_classes_agree, check_not_empty, list_classes, read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.sampler import BatchSampler

UNUSUAL = ("cmyk.JPEG", "grey.JPEG", "png.JPEG", "progressive.JPEG")
UNTOUCHED = Views(0)
CENTER, RANDOM_CROP = Augmentation(center=True), Augmentation(center=False)
# (width, height) of photographs.
SIZES = [(427, 301), (333, 500), (256, 257), (640, 427), (301, 300), (150, 120), (227, 481)]


def photograph(width: int, height: int, name: str = "china.jpg") -> Image.Image:
    return Image.fromarray(load_sample_image(name)).resize((width, height), Image.Resampling.LANCZOS)


def loaded(images: ImageIndex, augmentation: Augmentation) -> dict[str, NDArray[np.uint8]]:
    """The identity view of each image from the Loader, by file name."""
    loader = Loader(
        BatchSampler(images, global_batch_size=4, seed=0, train=False),
        augmentation=augmentation,
        views=UNTOUCHED,
        side=224,
    )
    return {
        Path(images.path(index)).name: views[0]
        for batch in loader.epoch(0)
        for views, index in zip(batch.views.numpy(), batch.index.tolist())
    }


def by_torchvision(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Compose([Resize(256), CenterCrop(224)])(Image.open(path).convert("RGB")))


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.abs(one.astype(np.float64) - other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder of photographs with odd sizes and unusual formats."""
    folder = tmp_path_factory.mktemp("data") / "val" / "one"
    folder.mkdir(parents=True)
    for position, (width, height) in enumerate(SIZES):
        name = ("china.jpg", "flower.jpg")[position % 2]
        photograph(width, height, name).save(folder / f"{width}x{height}.JPEG", quality=92)
    image = photograph(400, 300, "flower.jpg")
    image.convert("CMYK").save(folder / "cmyk.JPEG", quality=92)
    image.convert("L").save(folder / "grey.JPEG", quality=92)
    image.save(folder / "png.JPEG", format="PNG")
    image.save(folder / "progressive.JPEG", quality=92, progressive=True)
    return folder


@pytest.fixture(scope="module")
def views(folder) -> dict[str, NDArray[np.uint8]]:
    """The folder's images as the Loader evaluates them."""
    return loaded(read_index(folder.parent.parent, "val"), CENTER)


def test_the_unusual_files_are_what_they_are_called(folder):
    opened = {name: Image.open(folder / name) for name in UNUSUAL}
    assert opened["cmyk.JPEG"].mode == "CMYK"
    assert opened["grey.JPEG"].mode == "L"
    assert opened["png.JPEG"].format == "PNG"
    assert opened["progressive.JPEG"].info["progressive"]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_come_out_as_pil_shows_them(folder, views, name):
    assert difference(views[name], by_torchvision(folder / name)).mean() < 0.5


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_evaluation_preprocessing_is_torchvisions_resize_and_center_crop(folder, views, width, height):
    """Equal within rounding, and not shifted: a shift by one pixel is clearly worse."""
    got, expected = views[f"{width}x{height}.JPEG"], by_torchvision(folder / f"{width}x{height}.JPEG")
    mean = difference(got, expected).mean()
    shifted = [difference(np.roll(got, step, axis), expected)[1:-1, 1:-1].mean() for step in (1, -1) for axis in (0, 1)]
    assert mean < 0.5
    assert difference(got, expected).max() <= 1
    assert min(shifted) > 3 > 4 * mean


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_ignored_as_torchvisions_loader_does(tmp_path, orientation):
    """Orientation 3 means half a turn, 6 a quarter turn."""
    folder = tmp_path / "val" / "one"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(400, 300).save(folder / "exif.JPEG", quality=92, exif=exif)
    assert Image.open(folder / "exif.JPEG").getexif()[0x0112] == orientation
    got = loaded(read_index(tmp_path, "val"), CENTER)["exif.JPEG"]
    assert difference(got, by_torchvision(folder / "exif.JPEG")).mean() < 0.5


def test_random_crops_are_pils_crop_and_resize(folder):
    """All sizes and formats. Another test compares the boxes with torchvision's."""
    images = read_index(folder.parent.parent, "val")
    views = loaded(images, RANDOM_CROP)
    header = np.zeros(len(Header), np.int64)
    header[Header.KEY], header[Header.SIDE] = pack_key(EVALUATION, 0), 224
    boxes = set()
    for index in range(len(images)):
        path = Path(images.path(index))
        opened = Image.open(path).convert("RGB")
        geometry, header[Header.INDEX] = np.zeros(len(Geometry), np.int32), index
        colour, matrices = np.zeros(len(Colour), np.float32), np.zeros((1, 2, 3), np.float32)
        shape_HWC = np.array([opened.height, opened.width, 3], np.int64)
        draw_image(geometry, colour, matrices, header, shape_HWC, UNTOUCHED.rows(), RANDOM_CROP.row())
        top, left, height, width = map(int, geometry[Geometry.BOX_Y : Geometry.BOX_W + 1])
        boxes.add((top, left, height, width))
        expected = opened.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
        assert difference(views[path.name], np.asarray(expected)).max() <= 1, path.name
    assert len(boxes) == len(images)


# The folder


def make_split(root: Path, *files: str) -> None:
    """Write tiny images at these paths below root."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / file, format="PNG")


def assert_agrees_with_image_folder(data: Path, split: str) -> ImageIndex:
    index, expected = read_index(data, split), ImageFolder(data / split)
    assert index.classes == tuple(expected.classes)
    assert [(index.path(i), int(index.labels[i])) for i in range(len(index))] == expected.samples
    assert index.labels.dtype == np.int64 and index.paths.dtype == np.uint8
    return index


def test_classes_labels_and_order_are_image_folders(tmp_path):
    make_split(tmp_path / "train", "n02/b.JPEG", "n02/a.JPEG", "n02/a10.jpg", "n02/a9.jpg", "n02/a-1.jpg", "N1/Z.PNG")
    make_split(tmp_path / "train", "n10/1.webp", "n10/é.jpeg", "n10/z.tiff", "n10/with space.bmp", "_x/.hidden.jpg")
    (tmp_path / "train" / "n02" / "notes.txt").touch()
    (tmp_path / "train" / "n02" / "jpg").touch()
    (tmp_path / "train" / "README.jpg").touch()
    index = assert_agrees_with_image_folder(tmp_path, "train")
    assert index.classes == ("N1", "_x", "n02", "n10")
    assert len(index) == 11
    assert index.relative_path(0) == "train/N1/Z.PNG"


def test_images_in_subfolders_and_behind_links_are_found(tmp_path):
    """In ImageFolder's order, which sorts a class by subfolder first."""
    make_split(tmp_path / "elsewhere", "d.jpg")
    make_split(tmp_path / "val", "a/x.jpg", "a/sub/y.jpg", "a/sub/deep/z.jpg", "a/sub-1/w.jpg", "b/x.jpg")
    (tmp_path / "val" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "val" / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(assert_agrees_with_image_folder(tmp_path, "val")) == 7


def test_the_digits_are_read_as_image_folder_reads_them():
    for split, count in (("train", 1497), ("val", 300)):
        assert len(assert_agrees_with_image_folder(export_digits(), split)) == count


def test_first_classes_and_random_subset():
    images = read_index(export_digits(), "val")
    three = images.first_classes(3)
    assert three.classes == ("0", "1", "2")
    assert len(three) == (images.labels < 3).sum()
    assert {Path(three.path(i)).parent.name for i in range(len(three))} == {"0", "1", "2"}

    some = images.random_subset(100)
    kept = [some.path(i) for i in range(len(some))]
    everything = [images.path(i) for i in range(len(images))]
    assert len(set(kept)) == 100 and set(kept) <= set(everything)
    assert kept == sorted(kept, key=everything.index)
    assert kept == [images.random_subset(100).path(i) for i in range(100)]
    assert set(kept) <= {images.random_subset(150).path(i) for i in range(150)}
    assert len(set(some.labels.tolist())) == 10
    assert [int(label) for label in some.labels] == [int(Path(path).parent.name) for path in kept]
    assert len(images.random_subset(10_000)) == 300


@pytest.mark.parametrize("count", [0, 11, -1])
def test_classes_that_are_not_there_cannot_be_kept(count):
    with pytest.raises(ValueError, match=f"classes is {count}: .*val has 10 classes"):
        read_index(export_digits(), "val").first_classes(count)


def test_an_empty_subset_is_refused():
    with pytest.raises(ValueError, match=r"cannot keep 0 images of .*val"):
        read_index(export_digits(), "val").random_subset(0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--data {tmp_path}/nowhere: no such folder"):
        list_classes(tmp_path / "nowhere", "train")


def test_a_missing_split_is_named_with_what_is_there(tmp_path):
    make_split(tmp_path, "training/a/x.jpg")
    with pytest.raises(
        UserError, match=r"no folder train/ in it \(found: training\)\nexpected .*/train/<class>/<image>"
    ):
        read_index(tmp_path, "train")


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val is empty"):
        read_index(tmp_path, "val")
    with pytest.raises(UserError, match=r"no folder train/ in it \(found: val\)"):
        read_index(tmp_path, "train")


def test_a_flat_validation_folder_is_refused_with_a_line_that_sorts_it(tmp_path, monkeypatch):
    make_split(tmp_path / "val", "val_2.JPEG", "val_1.JPEG", "val_3.JPEG")
    with pytest.raises(UserError, match="val contains 3 images but no class folders") as error:
        list_classes(tmp_path, "val")
    python, option, program = shlex.split(str(error.value).splitlines()[-1])
    assert (python, option) == ("python", "-c")
    # Sorted by name, the images belong to the classes of the development kit's ground truth, in its order.
    monkeypatch.setattr(imagenet, "parse_devkit_archive", lambda root: None)
    monkeypatch.setattr(imagenet, "load_meta_file", lambda root: ({}, ["n02", "n01", "n02"]))
    exec(program, {})
    index = read_index(tmp_path, "val")
    found = [index.relative_path(position) for position in range(3)]
    assert found == ["val/n01/val_2.JPEG", "val/n02/val_1.JPEG", "val/n02/val_3.JPEG"]


def test_a_flat_training_folder_is_refused(tmp_path):
    make_split(tmp_path / "train", "x.JPEG")
    with pytest.raises(UserError, match="train contains 1 images but no class folders\nsort them into"):
        list_classes(tmp_path, "train")


def test_classes_must_agree(tmp_path):
    make_split(tmp_path / "train", *(f"{name}/x.jpg" for name in ("a", "b", "p", "q", "r", "s")))
    make_split(tmp_path / "val", "a/x.jpg", "b/x.jpg", "z/x.jpg")
    with pytest.raises(UserError, match=r"\(only in train: p, q, r and 1 more; only in val: z\)"):
        check_classes_agree(tmp_path)
    for name in ("p", "q", "r", "s"):
        shutil.rmtree(tmp_path / "train" / name)
    make_split(tmp_path / "train", "z/x.jpg")
    assert check_classes_agree(tmp_path) == ["a", "b", "z"]


def test_a_class_without_images_is_named(tmp_path):
    make_split(tmp_path / "train", "a/x.jpg", "c/x.jpg")
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "notes.txt").touch()
    for check in (lambda: check_not_empty(tmp_path, "train", ["a", "b", "c"]), lambda: read_index(tmp_path, "train")):
        with pytest.raises(
            UserError, match=r"class folder .*/train/b contains no images\nadd images, or remove the folder"
        ):
            check()
    check_not_empty(tmp_path, "train", ["a", "c"])
