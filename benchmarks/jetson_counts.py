"""Record registers and shared memory of jetson-orin's kernels: `python benchmarks/jetson_counts.py`.

Of tiny-moe's library, from the machine code for sm_87 in it; writes benchmarks/results/jetson-kernels.json.
"""

import argparse
import json
import struct
import tempfile
from pathlib import Path

import moqc

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "jetson-kernels.json"
MODEL = ROOT / "examples" / "models" / "tiny-moe"
OPTIONS = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn"}
EM_CUDA = 190
MAGIC = b"\x7fELF"


def count(library: bytes) -> dict[str, dict[str, int]]:
    """Kernel -> registers a thread, bytes of shared memory that it always takes."""
    found: dict[str, dict[str, int]] = {}
    at = library.find(MAGIC, 1)
    while at >= 0:
        image = library[at:]
        if struct.unpack_from("<H", image, 18)[0] == EM_CUDA:
            for name, size, info in sections(image):
                kind, _, kernel = name.removeprefix(".").rpartition(".")
                if kind == "text":
                    found.setdefault(kernel, {}).update(registers=info >> 24)
                elif kind == "nv.shared":
                    found.setdefault(kernel, {}).update(shared_bytes=size)
        at = library.find(MAGIC, at + len(MAGIC))
    return found


def sections(image: bytes) -> list[tuple[str, int, int]]:
    """Name, size and info word of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", image, 40)
    width, number, names = struct.unpack_from("<3H", image, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * width) for i in range(number)]
    start = heads[names][4]
    found = []
    for name, _, _, _, _, size, _, info, _, _ in heads:
        text = image[start + name : image.index(b"\0", start + name)]
        found.append((text.decode(), size, info))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=FILE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        moqc.compile(MODEL, Path(folder, "model"), target="jetson-orin", **OPTIONS)
        kernels = count(Path(folder, "model", "model.so").read_bytes())
    content = {"command": "python benchmarks/jetson_counts.py", "kernels": dict(sorted(kernels.items()))}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    for name, each in content["kernels"].items():
        print(f"{name:40}", " ".join(f"{key} {value}" for key, value in each.items()))


if __name__ == "__main__":
    main()
