"""A folder listing of ImageNet's size: 1.28 million entries in 1,000 classes."""

from __future__ import annotations

import os
import time

import pytest

from fast_spatial.pipelines.dataset import count_images, list_classes, read_index

CLASSES, PER_CLASS = 1000, 1281
LINKS_OF_A_FILE = 20_000  # file systems allow 65,000 or so


@pytest.mark.slow
def test_a_listing_of_imagenets_size_is_read_in_order_and_with_little_more_work_than_a_walk(tmp_path):
    entries = 0
    for label in range(CLASSES):
        folder = tmp_path / "train" / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(PER_CLASS):
            if entries % LINKS_OF_A_FILE == 0:
                source = tmp_path / f"{entries}.jpg"
                source.write_bytes(b"\xff\xd8\xff")
            os.link(source, folder / f"{number:05}.JPEG")
            entries += 1

    def walked() -> float:
        start = time.process_time()
        assert sum(len(files) for _, _, files in os.walk(tmp_path / "train")) == entries
        return time.process_time() - start

    walk_sec = min(walked(), walked())
    start = time.process_time()
    images = read_index(tmp_path, "train")
    read_sec = time.process_time() - start
    assert len(images) == entries == 1_281_000
    assert [images.relative_path(p) for p in (0, PER_CLASS, entries - 1)] == [
        "train/n00000000/00000.JPEG",
        "train/n00000001/00000.JPEG",
        "train/n00000999/01280.JPEG",
    ]
    assert images.labels[[0, PER_CLASS - 1, PER_CLASS, entries - 1]].tolist() == [0, 0, 1, 999]
    assert images.class_counts().tolist() == [PER_CLASS] * CLASSES
    assert images.paths.nbytes < 400 * entries
    assert count_images(tmp_path, "train", list_classes(tmp_path, "train"), at_most=2 * entries) == entries
    assert read_sec < 10 * walk_sec, (read_sec, walk_sec)  # of this process's CPU
