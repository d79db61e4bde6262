"""Decode speed of an artifact beside transformers' eager float32, in turns, on the same threads.

    python benchmarks/decode_vs_transformers.py ARTIFACT MODEL [--tokens 64] [--rounds 5]

Each side decodes greedily from the same 16-token prompt in a process of its own (neither holds the other's
thread pool); rounds alternate, and the ratio of the medians is what counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

MOQC = """
import json, sys, time, moqc, numpy as np
artifact, tokens = moqc.load(sys.argv[1]), int(sys.argv[2])
for _ in range(2):
    session = artifact.session()
    logits = session.extend_last(np.arange(100, 116)[None])
    start = time.perf_counter()
    for _ in range(tokens - 1):
        logits = session.extend_last(logits.argmax(-1)[:, None])
    end = time.perf_counter()
print(json.dumps((tokens - 1) / (end - start)))
"""

TRANSFORMERS = """
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[3]))
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
tokens = int(sys.argv[2])
with torch.no_grad():
    for _ in range(2):
        output = model(torch.arange(100, 116)[None], use_cache=True)
        start = time.perf_counter()
        for _ in range(tokens - 1):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        end = time.perf_counter()
print(json.dumps((tokens - 1) / (end - start)))
"""


def measure(code: str, path: str, tokens: int, threads: int) -> float:
    """Tokens per second of one fresh process."""
    command = [sys.executable, "-c", code, path, str(tokens), str(threads)]
    environment = {"PATH": "/usr/bin:/bin", "TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(measure(MOQC, options.artifact, options.tokens, options.threads))
        theirs.append(measure(TRANSFORMERS, options.model, options.tokens, options.threads))
    for name, values in (("moqc", ours), ("transformers eager float32", theirs)):
        spread = ", ".join(f"{value:.0f}" for value in sorted(values))
        print(f"{name}: median {statistics.median(values):.1f} tokens/s (of {spread})")
    print(f"ratio of medians: {statistics.median(ours) / statistics.median(theirs):.2f}")


if __name__ == "__main__":
    main()
