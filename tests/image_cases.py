"""Small image folders for the tests of the data loading and of the command line."""

import tarfile

import numpy as np
from PIL import Image


def write_images(folder, num_images=12, *, size=32, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


def write_classes(folder, names, num_images=4):
    for i, name in enumerate(names):
        write_images(folder / name, num_images, seed=i)
    return folder


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])


def as_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
    return path
