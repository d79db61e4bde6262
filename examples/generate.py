"""Load a compiled model and print text as it comes: ``python examples/generate.py out/tiny "Il était une"``.

Needs TVM's runtime library only; neither torch nor transformers is imported.
"""

from __future__ import annotations

import sys

import moqc

if len(sys.argv) != 3:
    sys.exit("usage: generate.py ARTIFACT PROMPT")
model = moqc.load(sys.argv[1])
for piece in model.stream(sys.argv[2], max_tokens=48, temperature=0.8, top_p=0.95, seed=0):
    print(piece, end="", flush=True)
print()
