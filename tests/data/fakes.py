"""Random images, as arrays and in the archives' layout."""

import pickle
from pathlib import Path

import numpy as np


def pixels(number, seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def write_pickle(path: Path, content: dict, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def flat(images):
    """(N,H,W,3) as the archives store it: (N,3*H*W), all of red first."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
