"""What a data set is made of and how it is read: the dataclasses behind ``conf/data/*.yaml``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from torchrec_hilomoe.config import STRICT

SPLITS = ("train", "valid", "test")

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
#: The largest number that dense features can hold.
FLOAT32_MAX = float(np.finfo(np.float32).max)
CriteoSizes = Annotated[list[PositiveInt], Field(min_length=26, max_length=26)]
Pooling = Literal["mean", "sum"]


def _name_to_mapping(entry: Any) -> Any:
    """Lets a column be given by its bare name."""
    return {"name": entry} if isinstance(entry, str) else entry


def _csv_character(text: str) -> str:
    """Checks for what Arrow's CSV parser takes."""
    if len(text) != 1 or not text.isascii() or text in "\r\n":
        raise ValueError("expected one ASCII character that is no line end, or null")
    return text


@dataclass
class DenseColumn:
    """A numeric column, where booleans are 0 and 1.

    Args:
        name (str): the column in the raw file.
        missing (float): the value a missing number gets, after the transform; a finite float32.
            The default is the neutral one for each transform (the mean, for ``standardize``).
        transform (str): ``"none"``, ``"log"`` (``sign(x) * log1p(|x|)``, defined for negative
            numbers too) or ``"standardize"`` (mean 0 and deviation 1 on the training rows).
    """

    __pydantic_config__ = STRICT

    name: str
    missing: Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)] = 0.0  # NaN is neither
    transform: Literal["none", "log", "standardize"] = "none"


@dataclass
class CategoricalColumn:
    """A column with one id per row. Row 0 of its table serves unknown and missing ids.

    Args:
        name (str): the column in the raw file.
        min_count (int): ids seen less often than this in the training rows are unknown.
        hash_size (int | None): hash ids into this many table rows, below 2**31, instead of
            building a vocabulary.
    """

    __pydantic_config__ = STRICT

    name: str
    min_count: PositiveInt = 1
    hash_size: Annotated[int, Field(ge=1, lt=2**31)] | None = None  # rows are held as int32

    def __post_init__(self) -> None:
        if self.hash_size is not None and self.min_count != 1:
            raise ValueError(
                f"column {self.name!r} has both hash_size and min_count; hashing counts no ids, "
                "leave one of them out"
            )


@dataclass
class MultiValuedColumn(CategoricalColumn):
    """A column with any number of ids per row; an empty value is an empty bag.

    Args:
        name (str): the column in the raw file.
        min_count (int): as for :class:`CategoricalColumn`.
        hash_size (int | None): as for :class:`CategoricalColumn`.
        separator (str | None): splits text into ids. Columns of a list type (Parquet) need none.
        pooling (str): how the embeddings of a bag are joined, ``"mean"`` or ``"sum"``.
    """

    separator: Annotated[str, Field(min_length=1)] | None = "|"
    pooling: Pooling = "mean"


@dataclass
class SchemaConfig:
    """The columns of a tabular data set. List entries are mappings or bare names.

    Args:
        label (str): the column to predict: 0 or 1, or false or true.
        positive_threshold (float | None): makes the label ``column >= positive_threshold``.
        dense (list[DenseColumn]): numeric columns.
        categorical (list[CategoricalColumn]): columns with one id per row.
        multi_valued (list[MultiValuedColumn]): columns with a bag of ids per row.
        group (str | None): the column by which grouped AUC groups rows, usually the user. It may
            be one of the columns above or any other.
    """

    __pydantic_config__ = STRICT

    label: str = "label"
    positive_threshold: float | None = None
    dense: list[Annotated[DenseColumn, BeforeValidator(_name_to_mapping)]] = field(
        default_factory=list
    )
    categorical: list[Annotated[CategoricalColumn, BeforeValidator(_name_to_mapping)]] = field(
        default_factory=list
    )
    multi_valued: list[Annotated[MultiValuedColumn, BeforeValidator(_name_to_mapping)]] = field(
        default_factory=list
    )
    group: str | None = None

    def __post_init__(self) -> None:
        features = [*(c.name for c in self.dense), *(c.name for c in self.sparse)]
        counts = Counter([self.label, *features])
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(
                f"listed more than once: {', '.join(map(repr, repeated))}; a column is either the "
                "label or in one of dense, categorical and multi_valued"
            )

    @property
    def sparse(self) -> list[CategoricalColumn]:
        """Categorical and multi-valued columns, in the order of the sparse features."""
        return [*self.categorical, *self.multi_valued]

    @property
    def columns(self) -> list[str]:
        """Every raw column that is read, each once; the label first."""
        names = [self.label, *(c.name for c in self.dense), *(c.name for c in self.sparse)]
        return list(dict.fromkeys([*names, *([self.group] if self.group else [])]))


@dataclass
class SyntheticOptions:
    """Size and seed of the generated data (see :mod:`torchrec_hilomoe.data.synthetic`).

    Args:
        train_rows (int): rows of the train split.
        valid_rows (int): rows of the valid split.
        test_rows (int): rows of the test split.
        seed (int): decides the world and its clicks; independent of the seed of the training.
    """

    __pydantic_config__ = STRICT

    train_rows: PositiveInt = 200_000
    valid_rows: PositiveInt = 40_000
    test_rows: PositiveInt = 40_000
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass
class DataConfig:
    """A data set: where its files are, what their columns mean and how batches are cut.

    Args:
        name (str): what logs and reports call the data set.
        source (str): ``"tabular"`` reads CSV, TSV and Parquet files; ``"synthetic"`` generates
            its own and ``"movielens100k"`` downloads its own, of the ``schema`` in ``conf/data``;
            ``"criteo_1tb"`` reads the npy binaries of TorchRec's preprocessing.
        train (str | list[str] | None): file, folder or glob of the training rows, or several.
        valid (str | list[str] | None): the same for validation.
        test (str | list[str] | None): the same for testing.
        schema (SchemaConfig): the columns.
        vocabularies_from (str | None): the folder ``encoder`` of a checkpoint. Its values keep
            their table rows, whether or not the training rows have them, and new values come behind
            them; standardised columns keep its statistics.
        batch_size (int): rows of a batch over all ranks; a multiple of their number.
        format (str): ``"auto"`` goes by the suffix; ``"csv"`` or ``"parquet"`` overrule it.
        delimiter (str | None): of CSV; by default a tab for ``.tsv`` and a comma otherwise.
        quote_char (str | None): of CSV: encloses values that hold delimiters or line breaks,
            doubled it stands for itself; None where quotes are characters like any other, as in
            many a TSV. Files in which a quote would join several rows into one are refused.
        column_names (list[str] | None): for CSV files without a header line.
        on_bad_row (str): ``"raise"`` stops at a row that cannot be used, naming it; ``"skip"``
            leaves such rows out, counts and reports them.
        shuffle (bool): whether training rows are shuffled, differently in each epoch.
        shuffle_buffer (int): rows within which single rows are shuffled; blocks of rows are
            shuffled over the whole data set in any case. Bounds the memory of a loader.
        num_workers (int): processes that prepare batches, per rank; 0 prepares them in line.
        cache_dir (str | None): where encoded data live; by default the environment variable
            ``TORCHREC_HILOMOE_CACHE``, or ``torchrec_hilomoe`` in the user's cache folder.
        synthetic (SyntheticOptions): for ``source: synthetic``.
        hash_sizes (int | list[int] | None): for ``source: criteo_1tb``: table rows of its 26
            sparse features, into which ids are taken modulo; one number serves all.
    """

    __pydantic_config__ = STRICT

    name: str = "tabular"
    source: Literal["tabular", "synthetic", "movielens100k", "criteo_1tb"] = "tabular"
    train: str | list[str] | None = None
    valid: str | list[str] | None = None
    test: str | list[str] | None = None
    schema: SchemaConfig = field(default_factory=SchemaConfig)
    vocabularies_from: str | None = None
    batch_size: PositiveInt = 4096
    format: Literal["auto", "csv", "parquet"] = "auto"
    delimiter: Annotated[str, AfterValidator(_csv_character)] | None = None
    quote_char: Annotated[str, AfterValidator(_csv_character)] | None = '"'
    column_names: list[str] | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    shuffle: bool = True
    shuffle_buffer: PositiveInt = 4_194_304
    num_workers: Annotated[int, Field(ge=0)] = 0
    cache_dir: str | None = None
    synthetic: SyntheticOptions = field(default_factory=SyntheticOptions)
    hash_sizes: PositiveInt | CriteoSizes | None = None

    def __post_init__(self) -> None:
        delimiters = [self.delimiter] if self.delimiter else [",", "\t"]
        if self.quote_char in delimiters:
            raise ValueError(
                f"quote_char: {self.quote_char!r} is the delimiter; give another character, or "
                "null where quotes mean nothing"
            )

    def paths(self, split: str) -> list[str]:
        """The files, folders and globs of ``"train"``, ``"valid"`` or ``"test"``."""
        given = getattr(self, split)
        return [given] if isinstance(given, str) else list(given or ())
