"""CIFAR-10 from a folder with its python version: ``data_batch_1`` to ``_5`` and ``test_batch``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.digits_mlp import Data


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers, and refuses everything that could run code."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })

    def find_class(self, module: str, name: str) -> Any:
        """The few classes an array's pickle names."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        return super().find_class(module, name)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 3072), uint8, and labels (samples,), int64, of one file.

    Raises:
        ValueError: the file holds something else.
    """
    with path.open("rb") as file:
        entries = _Unpickler(file, encoding="bytes").load()
    images, labels = entries.get(b"data"), entries.get(b"labels")
    if images is None or labels is None or np.shape(images) != (len(labels), 3072):
        raise ValueError(f"{path} is no CIFAR-10 batch: it needs data (samples, 3072) and labels")
    return np.asarray(images, dtype=np.uint8), np.asarray(labels, dtype=np.int64)


def cifar10(folder: str | Path) -> Data:
    """All training and test images, each channel with mean 0 and standard deviation 1.

    Raises:
        FileNotFoundError: a file is missing; the message says where the archive's files belong.
        ValueError: a file holds something else.
    """
    folder = Path(folder)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; unpack cifar-10-python.tar.gz and pass its "
            "folder cifar-10-batches-py"
        )
    batches = [read_batch(folder / name) for name in names]
    images = np.concatenate([images for images, _ in batches[:5]]).astype(np.float32)
    channels = images.reshape(-1, 3, 1024)
    mean = channels.mean(axis=(0, 2), keepdims=True)
    deviation = channels.std(axis=(0, 2), keepdims=True) + 1e-6

    def scaled(raw: np.ndarray) -> np.ndarray:
        values = (raw.reshape(-1, 3, 1024).astype(np.float32) - mean) / deviation
        return values.reshape(-1, 3072).astype(np.float32)

    return Data(scaled(images), np.concatenate([labels for _, labels in batches[:5]]),
                scaled(batches[5][0]), batches[5][1])
