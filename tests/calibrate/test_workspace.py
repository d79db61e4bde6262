from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moqc.calibrate.workspace import ParamStore, Workspace, default_root, digest
from moqc.errors import UserError


def test_digest_tells_parts_and_types_apart() -> None:
    same = digest("a", 1, [2.0, None], {"x": 1, "y": b"z"})
    assert same == digest("a", 1, (2.0, None), {"y": b"z", "x": 1})
    others = [
        digest("ab", "c"),
        digest("a", "bc"),
        digest(1),
        digest(True),
        digest(1.0),
        digest("1"),
        digest(),
    ]
    assert len({same, *others}) == 8
    assert digest(np.zeros(4, np.int8)) != digest(np.zeros((2, 2), np.int8))
    assert digest(np.zeros(4, np.int8)) != digest(np.zeros(1, np.int32))


def test_digest_refuses_objects() -> None:
    with pytest.raises(TypeError, match="plain values"):
        digest(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="objects"):
        digest(np.array([object()]))


def test_tensors_and_json_come_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "cache")
    key = digest("statistics", 1)
    assert not workspace.has(key)
    with pytest.raises(KeyError):
        workspace.load_tensors(key)
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    workspace.save_tensors(key, {"view": base.T, "same memory": base, "half": base.to(torch.bfloat16)})
    loaded = workspace.load_tensors(key)
    assert workspace.has(key)
    assert torch.equal(loaded["view"], base.T)
    assert torch.equal(loaded["same memory"], base)
    assert loaded["half"].dtype == torch.bfloat16
    other = digest("json")
    workspace.save_json(other, {"é": [1, 2.5, None]})
    assert workspace.load_json(other) == {"é": [1, 2.5, None]}
    with pytest.raises(KeyError):
        workspace.load_json(key)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    key = digest("interrupted")

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moqc.calibrate.workspace.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        workspace.save_tensors(key, {"x": torch.zeros(3)})
    assert not workspace.has(key)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_unwritable_root_is_a_user_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*; give another --cache"):
        Workspace(blocker / "cache").save_json(digest("x"), 1)


def test_keys_are_digests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a key"):
        Workspace(tmp_path).has("../../etc/passwd")


def test_default_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "moqc"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == Path.home() / ".cache" / "moqc"


NAMES = ["model.layers.0.mlp.experts.gate.0.codes", "a/b", "..", ".tmp-x", "%2E", "x y", "é", "A", "a"]


def test_param_store_round_trip(tmp_path: Path) -> None:
    store = ParamStore(tmp_path / "params")
    assert store.names() == []
    for number, name in enumerate(NAMES):
        assert name not in store
        store.put(name, np.full((2, 3), number, dtype=np.uint8))
    assert store.names() == sorted(NAMES)
    for number, name in enumerate(NAMES):
        assert name in store
        assert store.get(name).tolist() == [[number] * 3] * 2
    assert all(path.parent == tmp_path / "params" for path in tmp_path.rglob("*.npy"))
    with pytest.raises(KeyError):
        store.get("absent")


@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8])
def test_param_store_keeps_shape_and_dtype(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    store = ParamStore(tmp_path)
    store.put("x", array.T)
    got = store.get("x")
    assert got.shape == array.T.shape
    assert got.dtype == array.dtype
    assert np.array_equal(got, array.T)
    assert not got.flags.writeable


def test_param_store_replaces_and_refuses_objects(tmp_path: Path) -> None:
    store = ParamStore(tmp_path)
    store.put("x", np.zeros(3))
    store.put("x", np.ones(2))
    assert store.get("x").tolist() == [1, 1]
    with pytest.raises(ValueError, match="pickle"):
        store.put("x", np.array([object()]))
    assert store.get("x").tolist() == [1, 1]
    assert store.names() == ["x"]


@given(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=4))
def test_names_never_collide(names: list[str]) -> None:
    store = ParamStore("unused")
    encodable = [name for name in names if name.encode("utf-8", "ignore").decode() == name]
    assert len({store._path(name) for name in encodable}) == len(encodable)
