"""Sharded checkpoints are read without running code in them; PyTorch's own reader would run it."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gptfast.sharded import load_sharded

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
    for damaged in (whole[:40], b"", b"hello", pickle.dumps([1])):
        (folder / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata: expected metadata"):
            load_sharded(blank(new_state()), folder)
    metadata = pickle.load(io.BytesIO(whole))
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"expected names of files beside it, got '\.\./else"):
        load_sharded(blank(new_state()), folder)
