"""Files of golden values: written, or with --check compared with what comes out now."""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load

# outputs are rounded to multiples of this, which packs better; what libraries differ by is below it
STEP = 2.0**-16


def rounded(x: np.ndarray) -> np.ndarray:
    """Outputs as they are stored, float32."""
    return np.float32(np.round(np.float64(x) / STEP) * STEP)


def parts(array: np.ndarray) -> dict[str, np.ndarray]:
    """What can be compared: JSON without its writer's version, a file's tensors, or the array."""
    if array.dtype.kind == "U":
        return {
            key: np.array(str(x))
            for key, x in json.loads(str(array)).items()
            if key != "transformers_version"
        }
    return load(array.tobytes()) if array.dtype == np.uint8 else {"values": array}


def main(names: Iterable[str], values: Callable[[str], dict[str, np.ndarray]]) -> None:
    """Writes NAME.npz for each name, or compares what it holds with `values(name)`."""
    for name in names:
        path, found = Path(__file__).with_name(f"{name}.npz"), values(name)
        if "--check" not in sys.argv:
            np.savez_compressed(path, **found)
            continue
        with np.load(path, allow_pickle=False) as stored:
            np.testing.assert_equal(sorted(found), sorted(stored))
            for key in found:
                new, old = parts(found[key]), parts(stored[key])
                np.testing.assert_equal(sorted(new), sorted(old), err_msg=f"{name}: {key}")
                for part, value in new.items():
                    where = f"{name}: {key}: {part}"
                    if value.dtype.kind == "f":
                        np.testing.assert_allclose(
                            value, old[part], rtol=0, atol=2 * STEP, err_msg=where
                        )
                    else:
                        np.testing.assert_array_equal(value, old[part], err_msg=where)
        print(f"{name}: {len(found)} arrays agree")
