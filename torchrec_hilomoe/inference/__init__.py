"""Serving: from a checkpoint to a model without tables' shards, and from raw rows to its inputs."""

from torchrec_hilomoe.inference.export import export_model
from torchrec_hilomoe.inference.flat_inputs import FlatInputs, Request, flat_tensors
from torchrec_hilomoe.inference.loading import load_for_serving
from torchrec_hilomoe.inference.request_encoder import RequestEncoder

__all__ = [
    "FlatInputs",
    "Request",
    "RequestEncoder",
    "export_model",
    "flat_tensors",
    "load_for_serving",
]
