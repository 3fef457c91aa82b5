"""Sharded checkpoints are read without running code in them; PyTorch's own reader would run it."""

import io
import os
import pathlib
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gptfast import checkpoint
from gptfast.sharded import load_sharded
from gptfast.train_state import _restore_sharded, _sharded_state

# Without other processes PyTorch says that there are none.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def new_state():
    torch.manual_seed(3)
    return {
        "model": {"w": torch.randn(5, 3), "h": torch.randn(4).bfloat16()},
        "optimizer": {"lr": 0.25, "betas": (0.9, 0.95), "fused": None, "step": torch.tensor(7.0)},
        "average": {},
    }


def blank(state):
    empty = {"w": torch.zeros(5, 3), "h": torch.zeros(4).bfloat16()}
    optimizer = {"lr": 0.0, "betas": (0.0, 0.0), "fused": True, "step": torch.tensor(0.0)}
    return {**state, "model": empty, "optimizer": optimizer}


@pytest.fixture
def folder(tmp_path):
    save(new_state(), checkpoint_id=tmp_path / "sharded")
    return tmp_path / "sharded"


def test_what_was_saved_is_read(folder):
    state = blank(new_state())
    load_sharded(state, folder)
    expected = new_state()
    assert torch.equal(state["model"]["w"], expected["model"]["w"])
    assert torch.equal(state["model"]["h"], expected["model"]["h"])
    assert state["optimizer"] == expected["optimizer"]


def test_code_in_the_metadata_is_not_run(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(ValueError, match=r"\.metadata: expected metadata without code: .*mkdir"):
        load_sharded(blank(new_state()), folder)
    assert not marker.exists()
    with pytest.raises(BaseException, match="CheckpointException"):
        load(blank(new_state()), checkpoint_id=folder)
    assert marker.exists()


@pytest.mark.parametrize("name", ["eval", "Metadata.__init__"])
def test_other_names_in_the_metadata_are_refused(folder, name):
    module = "builtins" if name == "eval" else "torch.distributed.checkpoint.metadata"
    code = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
    code += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    (folder / ".metadata").write_bytes(code)
    with pytest.raises(ValueError, match=f"{name} is not part of it"):
        load_sharded(blank(new_state()), folder)


def test_fields_of_a_class_are_refused(folder):
    # Read by pickle alone, it sets PosixPath.name for the whole process.
    hostile = b"\x80\x04cpathlib\nPosixPath\nN}\x8c\x04name\x8c\x0c../elsewhere" + b"s\x86b."
    for code in (hostile, hostile.replace(b"pathlib\nPosixPath", b"torch\nSize")):
        (folder / ".metadata").write_bytes(code)
        with pytest.raises(ValueError, match=r"without code: fields of a \w+ are not part of it"):
            load_sharded(blank(new_state()), folder)
    assert pathlib.PosixPath("a/b").name == "b"
    assert not hasattr(torch.Size, "name")


class OtherPythons(pickle.Pickler):
    """Enums by their names, as Python 3.11.2 writes them."""

    def reducer_override(self, obj):
        if isinstance(obj, _MEM_FORMAT_ENCODING):
            return getattr, (type(obj), obj.name)
        return NotImplemented


def test_metadata_of_other_versions_of_python(folder):
    file, code = folder / ".metadata", io.BytesIO()
    OtherPythons(code, 2, fix_imports=False).dump(pickle.loads(file.read_bytes()))
    local = code.getvalue().replace(b"cpathlib\n", b"cpathlib._local\n")  # where 3.13 has paths
    assert b"cpathlib._local\nPosixPath\n" in local
    assert b"cbuiltins\ngetattr\n" in local
    file.write_bytes(local)
    state = blank(new_state())
    load_sharded(state, folder)
    assert torch.equal(state["model"]["w"], new_state()["model"]["w"])
    other = b"\x80\x02cbuiltins\ngetattr\nctorch\nSize\nX\x07\x00\x00\x00__new__\x86R."
    file.write_bytes(other)
    with pytest.raises(ValueError, match=r"builtins\.getattr is not part of it"):
        load_sharded(state, folder)


def test_code_in_place_of_a_tensor_is_not_run(folder, tmp_path):
    marker = tmp_path / "executed"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(info for i, info in metadata.storage_data.items() if i.fqn == "model.w")
    shard, hostile = folder / info.relative_path, io.BytesIO()
    torch.save(Hostile(marker), hostile)
    whole = shard.read_bytes()
    info.offset, info.length = len(whole), len(hostile.getvalue())
    shard.write_bytes(whole + hostile.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"expected tensors without code: .*mkdir") as error:
        load_sharded(blank(new_state()), folder)
    assert "weights_only" not in str(error.value)
    assert not marker.exists()


def test_values_of_another_type(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(
        model=model,
        optimizers=[torch.optim.AdamW(model.parameters())],
        average=[],
        settle=lambda: None,
        ranks=SimpleNamespace(on_first=lambda task: task()),
    )
    state = _sharded_state(trainer)
    state["optimizer"]["param_groups"][0]["params"] = 7
    save(state, checkpoint_id=tmp_path / "sharded")
    monkeypatch.setattr(checkpoint, "verify_sharded", lambda path: path / "sharded")
    with pytest.raises(ValueError, match="expected the optimizer's state of this model: TypeErr"):
        _restore_sharded(trainer, tmp_path)


def test_code_in_a_value_is_not_run(folder, tmp_path):
    marker = tmp_path / "executed"
    state = new_state()
    state["optimizer"]["lr"] = Hostile(marker)
    save(state, checkpoint_id=tmp_path / "hostile")
    with pytest.raises(ValueError, match=r"optimizer\.lr: expected a value without code"):
        load_sharded(blank(new_state()), tmp_path / "hostile")
    assert not marker.exists()
    load(blank(new_state()), checkpoint_id=tmp_path / "hostile")
    assert marker.exists()


def test_damage_and_other_models(folder):
    whole = (folder / ".metadata").read_bytes()
    state = blank(new_state())
    state["model"]["more"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"Missing key in checkpoint state_dict: model\.more"):
        load_sharded(state, folder)
    cut = [whole[:n] for n in range(0, len(whole), 29)]
    for damaged in (*cut, b"hello", pickle.dumps([1])):
        (folder / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^\S+: \S+\.metadata: expected metadata"):
            load_sharded(blank(new_state()), folder)
    metadata = pickle.load(io.BytesIO(whole))
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"expected names of files beside it, got '\.\./else"):
        load_sharded(blank(new_state()), folder)
