"""What of two data sets' columns and tables is the same."""

from __future__ import annotations

import numpy as np

from torchrec_hilomoe.data.encoder import TabularEncoder
from torchrec_hilomoe.data.rows import Int32Array
from torchrec_hilomoe.data.source import Encoder
from torchrec_hilomoe.data.vocabulary import look_up
from torchrec_hilomoe.errors import DataError


def other_columns(old: Encoder, new: Encoder) -> list[str]:
    """How the columns of two data sets differ to a model's layers, which know them by their order.

    Args:
        old (Encoder): of one data set.
        new (Encoder): of the other.

    Returns:
        list[str]: none where dense columns and sparse features have the same names, transforms and
        pooling, in the same order.
    """
    columns = {
        "dense columns": (_dense(old), _dense(new)),
        "sparse features": (_sparse(old), _sparse(new)),
    }
    return [
        f"{kind}: {', '.join(there) or 'none'} there, {', '.join(here) or 'none'} here"
        for kind, (there, here) in columns.items()
        if there != here
    ]


def matching_rows(feature: str, old: Encoder, new: Encoder) -> Int32Array | None:
    """Where the values of a feature's table stood in the table of another data set.

    Args:
        feature (str): a sparse feature of both.
        old (Encoder): of the data to match.
        new (Encoder): of the data whose values are looked for.

    Returns:
        Int32Array | None: for each row of the new table its row in the old one, -1 where the old
        data did not know the value; row 0, of unknown and missing values, stays. None where every
        row stands for what it stood for.

    Raises:
        DataError: the rows cannot be told: ids are hashed in one of both, or to other sizes.

    Example:
        >>> import pyarrow as pa
        >>> from torchrec_hilomoe.config import parse_config
        >>> from torchrec_hilomoe.data import SchemaConfig, TabularEncoder
        >>> schema = parse_config(SchemaConfig, {"label": "y", "categorical": ["user"]}, "schema")
        >>> def encoder(*users):
        ...     users = pa.array(users, pa.large_string())
        ...     return TabularEncoder(schema, None, {"user": users}, {})
        >>> matching_rows("user", encoder("ann", "bob"), encoder("bob", "eve", "ann")).tolist()
        [0, 2, -1, 1]
    """
    values, old_values = new.vocabulary(feature), old.vocabulary(feature)
    if values is not None and old_values is not None:
        if values.equals(old_values):
            return None
        rows = look_up(values, old_values)
        return np.concatenate((np.zeros(1, np.int32), np.where(rows > 0, rows, np.int32(-1))))
    there, here = _ids(feature, old), _ids(feature, new)
    if there != here:
        raise DataError(f"{feature}: {there} there, {here} here")
    return None


def _ids(feature: str, encoder: Encoder) -> str:
    """What the rows of a table are, in words."""
    size = next(f.num_embeddings for f in encoder.features.sparse if f.name == feature)
    if encoder.vocabulary(feature) is not None:
        return f"a vocabulary of {size - 1}"
    if isinstance(encoder, TabularEncoder):
        return f"hash_size {size - 1}"
    return f"{encoder.kind} of {size} rows"


def _dense(encoder: Encoder) -> list[str]:
    if not isinstance(encoder, TabularEncoder):
        return list(encoder.features.dense)
    return [
        column.name if column.transform == "none" else f"{column.name} ({column.transform})"
        for column in encoder.schema.dense
    ]


def _sparse(encoder: Encoder) -> list[str]:
    return [
        feature.name if feature.pooling == "sum" else f"{feature.name} ({feature.pooling})"
        for feature in encoder.features.sparse
    ]
