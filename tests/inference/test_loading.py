"""A checkpoint serves by itself: no process group, no training data, the same predictions."""

from __future__ import annotations

import dataclasses
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed as dist
from torchrec.inference.modules import quantize_inference_model

from torchrec_hilomoe.errors import CheckpointError, ConfigError, DataError
from torchrec_hilomoe.inference import (
    FlatInputs,
    RequestEncoder,
    flat_tensors,
    load_for_serving,
    loading,
)
from torchrec_hilomoe.models import registry
from torchrec_hilomoe.training import init_process_group
from torchrec_hilomoe.training.checkpoint import read_info

pytestmark = pytest.mark.filterwarnings("ignore")


def predict_file(model: FlatInputs, trained) -> torch.Tensor:
    return model(*flat_tensors(trained.batch())).squeeze(1).sigmoid()


@pytest.fixture
def scored(trained) -> torch.Tensor:
    """What ``examples/evaluate.py`` writes."""
    return torch.from_numpy(pq.read_table(trained.predictions)["prediction"].to_numpy())


def test_predicts_what_the_training_scores(trained, scored):
    assert not dist.is_initialized()
    model = load_for_serving(str(trained.checkpoint))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(predict_file(model, trained), scored)


def test_a_device_may_be_given_by_name(trained, scored):
    torch.testing.assert_close(
        predict_file(load_for_serving(trained.checkpoint, "cpu"), trained), scored
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_serves_on_the_device_that_is_given(trained, scored):
    device = torch.device("cuda")
    model = load_for_serving(trained.checkpoint, device)
    logits = model(*(tensor.to(device) for tensor in flat_tensors(trained.batch())))
    torch.testing.assert_close(logits.squeeze(1).sigmoid().cpu(), scored)


def test_loads_inside_of_a_process_group_alone(trained, scored, monkeypatch):
    init_process_group()
    try:
        for name in ("all_gather_object", "broadcast_object_list", "barrier"):
            monkeypatch.setattr(dist, name, None)
        model = load_for_serving(trained.checkpoint)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
    torch.testing.assert_close(predict_file(model, trained), scored)


def test_experts_take_part_as_the_checkpoint_says(trained, scored, monkeypatch):
    off = dataclasses.replace(read_info(trained.checkpoint), experts=False)
    monkeypatch.setattr(loading, "read_info", lambda checkpoint: off)
    difference = predict_file(load_for_serving(trained.checkpoint), trained) - scored
    assert difference.abs().max() > 1e-4


def test_tables_can_be_quantised(trained, scored):
    model = load_for_serving(trained.checkpoint)
    int8 = quantize_inference_model(model.model, quantization_dtype=torch.qint8)
    served = FlatInputs(int8, model.keys, model.num_dense)
    torch.testing.assert_close(predict_file(served, trained), scored, atol=0.01, rtol=0)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="is no checkpoint of this library"):
        load_for_serving(tmp_path)
    (tmp_path / "model.json").write_text('{"model": "of another library"}')
    with pytest.raises(ConfigError, match=r"of this library \(model.json lacks features, experts"):
        load_for_serving(tmp_path)


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    checkpoint = shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    weights = next(checkpoint.glob("weights/*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_for_serving(checkpoint)


@pytest.mark.parametrize(
    ("name", "key", "of_encoder"),
    [
        ("model.json", '"sparse"', ConfigError),
        ("model.json", '"num_embeddings"', ConfigError),
        ("encoder/encoder.json", '"label"', DataError),
        ("encoder/encoder.json", '"delimiter"', DataError),
    ],
)
def test_a_description_with_another_key_is_refused(trained, tmp_path, name, key, of_encoder):
    """As a flipped bit leaves it, which is JSON all the same."""
    checkpoint = shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    content = (checkpoint / name).read_text()
    (checkpoint / name).write_text(content.replace(key, f'{key[:-2]}?"', 1))
    with pytest.raises((CheckpointError, ConfigError)):
        load_for_serving(checkpoint)
    with pytest.raises(of_encoder):
        RequestEncoder(checkpoint)


def test_an_interaction_that_is_not_registered_is_named(trained, monkeypatch):
    monkeypatch.delitem(registry._ENTRIES, "hilomoe")
    with pytest.raises(ConfigError, match="no interaction 'hilomoe'.*Import the module that"):
        load_for_serving(trained.checkpoint)


def test_weights_that_do_not_fit_are_an_error(trained, monkeypatch):
    info = read_info(trained.checkpoint)
    wider = dataclasses.replace(info.model, over_arch_layer_sizes=[7])
    monkeypatch.setattr(
        loading, "read_info", lambda checkpoint: dataclasses.replace(info, model=wider)
    )
    with pytest.raises(CheckpointError, match="over_arch"):
        load_for_serving(trained.checkpoint)
