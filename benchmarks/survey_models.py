"""Write the table of supported architectures: moqc/frontend/models.json and docs/models.md.

    python benchmarks/survey_models.py [TYPE ...]

Runs the gate on every type (or on those given, keeping the other rows) and takes some ten minutes.
"""

import json
import sys
from pathlib import Path

import moqc.api
from moqc.frontend import survey

ROOT = Path(__file__).parents[1]


def render(table: survey.Survey) -> str:
    """The page docs/models.md."""
    exact = sum(row.status == "exact" for row in table.rows)
    lines = [
        "# Architectures",
        "",
        f"{exact} of the {len(table.rows)} decoder types with experts in transformers {table.transformers}",
        "are exact: a tiny random model of the type gives transformers' logits within 1e-4 of",
        "max(1, |logit|) at every stage (hooked, exported, compiled, decoded in pieces with padding). The",
        "others are refused with the reason below. Made by `python benchmarks/survey_models.py`;",
        "`moqc models --verify TYPE` runs the gate again.",
        "",
        "Models that attend a selection of the tokens before (`index_topk`: DeepSeek-V3.2, GLM-DSA, A.X K2,",
        "Hy4) are exact for contexts of up to so many tokens, and compiled for no longer ones. Of a",
        "multimodal checkpoint the language model is taken out where transformers has a class for it: llama4",
        "and qwen3_5_moe are tested",
        "(`tests/frontend/test_wrappers.py`); what is around it is named and ignored.",
        "",
        "| model type | status | reason |",
        "|---|---|---|",
        *(
            f"| {row.model_type} | {row.status} | {row.reason.replace('|', chr(92) + '|')} |"
            for row in table.rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main(types: list[str]) -> None:
    """Survey `types`, all if there are none."""
    rows = {} if not types else {row.model_type: row for row in survey.shipped().rows}
    for model_type in types or survey.decoder_types():
        (found,) = moqc.api.models(verify=model_type)["rows"]
        rows[model_type] = survey.Row(**found)
        print(f"{model_type:22} {found['status']:8} {found['reason']}", flush=True)
    import transformers

    table = survey.Survey(transformers.__version__, tuple(rows[name] for name in sorted(rows)))
    (ROOT / "moqc" / "frontend" / "models.json").write_text(json.dumps(table.dump(), indent=1) + "\n")
    (ROOT / "docs" / "models.md").write_text(render(table))


if __name__ == "__main__":
    main(sys.argv[1:])
