import json

import pytest

from moqc.errors import ArtifactError
from moqc.manifest import (
    MANIFEST,
    CacheSpec,
    FileRecord,
    check_hash,
    check_sizes,
    hash_file,
    read_manifest,
    record_files,
    seal,
    write_manifest,
)


@pytest.fixture
def folder(toy, tmp_path):
    """A folder with the toy's manifest alone."""
    write_manifest(tmp_path, read_manifest(toy.folder))
    return tmp_path


def rewrite(folder, change):
    """Change the manifest's content and seal it again: what another program might do."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(seal(json.dumps(content, indent=1)))


def test_round_trip(folder, toy):
    assert read_manifest(folder) == read_manifest(toy.folder)


def test_text_is_the_same_every_time(folder):
    manifest = read_manifest(folder)
    before = (folder / MANIFEST).read_bytes()
    write_manifest(folder, manifest)
    assert (folder / MANIFEST).read_bytes() == before
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("size", [0, 1, 8, 9, 95, 99, 10**3 - 7, 10**9])
def test_artifact_bytes_counts_the_manifest_itself(folder, size):
    manifest = read_manifest(folder).model_copy(
        update={"files": {"model.so": FileRecord(bytes=size, sha256="0" * 64)}}
    )
    written = write_manifest(folder, manifest)
    assert written.sizes.artifact_bytes == size + (folder / MANIFEST).stat().st_size
    assert read_manifest(folder).sizes == written.sizes


def test_sealing_twice_changes_nothing(folder):
    text = (folder / MANIFEST).read_text()
    assert seal(text) == text
    assert seal(text.replace("toy_moe", "toy_mob")) != text.replace("toy_moe", "toy_mob")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(mood="good"), "mood"),
        (lambda content: content.pop("target"), "target"),
        (lambda content: content["cache"].update(context="long"), r"cache\.context"),
        (lambda content: content.update(schema_version=0), "schema version 0"),
    ],
)
def test_other_content_is_refused_by_name(folder, change, says):
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=says):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b'"moqc"'])
def test_what_is_no_manifest(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST):
        read_manifest(folder)


def test_a_manifest_without_digest_is_refused(folder):
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="changed"):
        read_manifest(folder)


def test_files_are_recorded_and_checked(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_text("")
    records = record_files(tmp_path)
    assert records == {"a": FileRecord(bytes=3, sha256=hash_file(tmp_path / "a"))}
    assert records["a"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    check_sizes(tmp_path, records)
    check_hash(tmp_path, "a", records["a"])
    (tmp_path / "a").write_bytes(b"abd")
    check_sizes(tmp_path, records)
    with pytest.raises(ArtifactError, match="SHA-256"):
        check_hash(tmp_path, "a", records["a"])


def test_states_of_recurrent_layers_are_float32_whatever_keys_and_values_are():
    shapes = ((2, 2, 32), (2, 2, 32, 8), (2, 2, 32, 8))
    spec = CacheSpec(context=32, batch=2, chunk=8, tensors=shapes, dtype="float16", states=(0,))
    assert [dtype for _, dtype in spec.buffers] == ["float32", "float16", "float16"]
    assert tuple(shape for shape, _ in spec.buffers) == shapes
