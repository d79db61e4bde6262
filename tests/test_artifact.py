"""What `moqc.load` gives: the runtime's model, and scores and reports besides."""

import os
import subprocess
import sys

import moqc
from moqc.runtime import artifact as runtime


def test_load_gives_the_runtimes_model_and_more(toy):
    model = moqc.load(toy.folder)
    assert isinstance(model, moqc.Artifact)
    assert isinstance(model, runtime.Artifact)
    assert model.generate(toy.text[0], max_tokens=4) == toy.text[1:4]
    assert str(toy.folder) in repr(model)
    assert "<th>target</th>" in model._repr_html_()


def test_evaluate_equals_the_function(toy, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(toy.text * 8)
    model = moqc.load(toy.folder)
    assert model.evaluate([text], window=16).to_dict() == moqc.eval(toy.folder, [text], window=16).to_dict()


def test_report_shows_itself(toy):
    report = moqc.load(toy.folder).report()
    page = report.to_html()
    assert page.startswith("<!doctype html>")
    frame = report._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert frame.count('"') == 4  # nothing of the page ends the attribute


def test_loading_needs_no_compiler(toy):
    code = f"import sys, moqc; moqc.load({str(toy.folder)!r}); print(sorted({{'torch', 'transformers', "
    code += "'moqc.api', 'moqc.evaluate', 'moqc.report'} & set(sys.modules)))"
    code = code.replace("sorted({{", "sorted({")
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=os.environ
    )
    assert out.stdout.strip() == "[]"
