"""Write the static counts of the OpenCL and WebGPU kernels: `python benchmarks/portable_counts.py`."""

import json
from pathlib import Path

from moqc.bench.launched import count_format
from moqc.quant.formats import BITS, Format

FILE = Path(__file__).parents[1] / "schedules" / "portable" / "counts.json"


def main() -> None:
    """Count every width with zeros and float16 scales, and the other kinds of groups at 4 bits."""
    names = [*(f"int{bits}-g64" for bits in BITS), "int4-g64-sym", "int4-g64-s8"]
    counts = {name: count_format(Format.parse(name)) for name in names}
    FILE.write_text(json.dumps(counts, indent=1) + "\n")
    for name, found in counts.items():
        print(f"{name:14}", " ".join(f"{key} {value:g}" for key, value in found.items()))


if __name__ == "__main__":
    main()
