"""Any CTR data set as TorchRec batches, each rank its share."""

from torchrec_hilomoe.data.batch import CTRBatch, to_batch
from torchrec_hilomoe.data.config import (
    CategoricalColumn,
    DataConfig,
    DenseColumn,
    MultiValuedColumn,
    SchemaConfig,
    SyntheticOptions,
)
from torchrec_hilomoe.data.encoder import TabularEncoder
from torchrec_hilomoe.data.features import FeatureSpec, SparseFeature
from torchrec_hilomoe.data.hashing import NO_GROUP
from torchrec_hilomoe.data.loader import PADDING_LABEL, BatchLoader
from torchrec_hilomoe.data.opening import load_encoder, open_data, open_encoded, prepare_data
from torchrec_hilomoe.data.source import DataSource

__all__ = [
    "NO_GROUP",
    "PADDING_LABEL",
    "BatchLoader",
    "CTRBatch",
    "CategoricalColumn",
    "DataConfig",
    "DataSource",
    "DenseColumn",
    "FeatureSpec",
    "MultiValuedColumn",
    "SchemaConfig",
    "SparseFeature",
    "SyntheticOptions",
    "TabularEncoder",
    "load_encoder",
    "open_data",
    "open_encoded",
    "prepare_data",
    "to_batch",
]
