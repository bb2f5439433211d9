"""Generated CTR data in which a hierarchy decides which interaction matters.

Every product has a category and, below it, a brand: category → product → brand. The category
picks the *kind* of interaction that drives a click, the brand picks the *variant* of that kind:

=================== =========================== ====================================
category modulo 4   interaction                 what the brand decides
=================== =========================== ====================================
0, taste            user × product              which tastes of the user count
1, occasion         device × hour               which table of occasions counts
2, price            thrift of the user × price  whether dear or cheap attracts
3, interests        interests of the visit      which interests attract
=================== =========================== ====================================

Each click is thus explained by one of twelve small models, found by two steps of routing, on top
of the usual popularity of users and products and a little of quality and discount. Clicks are
drawn from known probabilities, so the AUC of the best possible model is known.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_hilomoe.data.cache import build_once, key_of
from torchrec_hilomoe.data.config import SyntheticOptions

#: Raised with every change of the generator.
_VERSION = 1

_USERS, _PRODUCTS, _BRANDS, _CATEGORIES = 300, 200, 24, 8
_VARIANTS, _TASTES = 3, 3
_DEVICES, _HOURS, _INTERESTS, _MOST_INTERESTS = 3, 8, 12, 4
_BIAS, _POPULARITY, _INTERACTION = -1.1, 0.7, 1.15
_BAYES_FILE = "bayes_auc.json"

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def synthetic_files(options: SyntheticOptions, root: Path) -> Path:
    """Generates the data unless they are in the cache.

    Args:
        options (SyntheticOptions): sizes and seed.
        root (Path): the cache.

    Returns:
        Path: a folder with ``train.parquet``, ``valid.parquet`` and ``test.parquet``, whose
        column ``click_probability`` is the truth, and the Bayes-optimal AUC of each.
    """
    return build_once(
        root / "synthetic" / key_of(_VERSION, dataclasses.asdict(options)),
        lambda folder: _generate(options, folder),
    )


def bayes_auc(folder: Path) -> dict[str, float]:
    """The AUC on each split of scoring its rows by their true click probabilities.

    Args:
        folder (Path): from :func:`synthetic_files`.

    Returns:
        dict[str, float]: by split; a split without both clicks and non-clicks has none.
    """
    return json.loads((folder / _BAYES_FILE).read_text())


def _generate(options: SyntheticOptions, folder: Path) -> None:
    sizes = {
        "train": options.train_rows,
        "valid": options.valid_rows,
        "test": options.test_rows,
    }
    world_seed, *split_seeds = np.random.SeedSequence(options.seed).spawn(1 + len(sizes))
    world = _World.draw(np.random.default_rng(world_seed))
    bayes = {}
    for (split, rows), seed in zip(sizes.items(), split_seeds, strict=True):
        table = world.visits(rows, np.random.default_rng(seed))
        pq.write_table(table, folder / f"{split}.parquet")
        labels = table["label"].to_numpy()
        if 0 < labels.sum() < rows:
            bayes[split] = _auc(table["click_probability"].to_numpy(), labels)
    (folder / _BAYES_FILE).write_text(json.dumps(bayes))


@dataclass(frozen=True)
class _World:
    """The truth about users, products and brands; the last axis of tastes is latent."""

    user_bias: FloatArray  # [users]
    thrift: FloatArray  # [users]
    tastes: FloatArray  # [users, variants, tastes]
    product_bias: FloatArray  # [products]
    product_share: FloatArray  # [products], sums to 1
    product_price: FloatArray  # [products]
    quality: FloatArray  # [products]
    brand: IntArray  # [products]
    flavour: FloatArray  # [products, tastes]
    occasions: FloatArray  # [variants, devices, hours]
    attraction: FloatArray  # [variants, interests]

    @classmethod
    def draw(cls, generator: np.random.Generator) -> _World:
        normal = generator.standard_normal
        share = np.arange(1, _PRODUCTS + 1) ** -0.6
        return cls(
            user_bias=_POPULARITY * normal(_USERS),
            thrift=normal(_USERS),
            tastes=normal((_USERS, _VARIANTS, _TASTES)) / np.sqrt(_TASTES),
            product_bias=_POPULARITY * normal(_PRODUCTS),
            product_share=share / share.sum(),
            product_price=0.7 * normal(_PRODUCTS),
            quality=normal(_PRODUCTS),
            brand=np.arange(_PRODUCTS) % _BRANDS,
            flavour=normal((_PRODUCTS, _TASTES)),
            occasions=normal((_VARIANTS, _DEVICES, _HOURS)),
            attraction=normal((_VARIANTS, _INTERESTS)),
        )

    def visits(self, rows: int, generator: np.random.Generator) -> pa.Table:
        """Draws visits and their clicks."""
        user = generator.integers(_USERS, size=rows)
        product = generator.choice(_PRODUCTS, rows, p=self.product_share)
        device = generator.integers(_DEVICES, size=rows)
        hour = generator.integers(_HOURS, size=rows)
        price = self.product_price[product] + 0.7 * generator.standard_normal(rows)
        discount = generator.exponential(size=rows)
        rating = self.quality[product] + 0.5 * generator.standard_normal(rows)
        age = generator.exponential(30.0, rows)
        interests = generator.integers(_INTERESTS, size=(rows, _MOST_INTERESTS))
        shown = np.arange(_MOST_INTERESTS) < generator.integers(_MOST_INTERESTS + 1, size=(rows, 1))
        decisive = self._interaction(user, product, device, hour, price, interests, shown)
        logit = (
            _BIAS
            + self.user_bias[user]
            + self.product_bias[product]
            + 0.2 * (self.quality[product] + np.minimum(discount, 2.0) - 1.0)
            + _INTERACTION * decisive
        )
        probability = 1.0 / (1.0 + np.exp(-logit))
        # A tenth of the ratings is unknown, as in real data.
        unrated = generator.random(rows) < 0.1
        return pa.table(
            {
                "label": (generator.random(rows) < probability).astype(np.int8),
                "user": user,
                "product": product,
                "brand": self.brand[product],
                "category": self.brand[product] % _CATEGORIES,
                "device": device,
                "hour": hour,
                "interests": _lists(interests, shown),
                "price": price,
                "discount": discount,
                "rating": pa.array(rating, mask=unrated),
                "age_days": age,
                "click_probability": probability,
            }
        )

    def _interaction(
        self,
        user: IntArray,
        product: IntArray,
        device: IntArray,
        hour: IntArray,
        price: FloatArray,
        interests: IntArray,
        shown: npt.NDArray[np.bool_],
    ) -> FloatArray:
        """The effect of the one interaction that counts for each visit."""
        brand = self.brand[product]
        variant = brand // _CATEGORIES % _VARIANTS
        taste = (self.tastes[user, variant] * self.flavour[product]).sum(axis=1)
        occasion = self.occasions[variant, device, hour]
        dear_or_cheap = np.array([1.0, -1.0, 0.5])[variant] * self.thrift[user] * price
        attracted = (self.attraction[variant[:, None], interests] * shown).sum(axis=1)
        attracted /= np.sqrt(np.maximum(shown.sum(axis=1), 1))
        return np.choose(brand % _CATEGORIES % 4, [taste, occasion, dear_or_cheap, attracted])


def _lists(values: IntArray, shown: npt.NDArray[np.bool_]) -> pa.ListArray:
    """The shown values of each row as one list."""
    offsets = np.concatenate([[0], np.cumsum(shown.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[shown]))


def _auc(scores: FloatArray, labels: npt.NDArray[np.int8]) -> float:
    """The share of (click, no click) pairs that the scores order rightly; ties count half."""
    clicks, others = scores[labels == 1], np.sort(scores[labels == 0])
    below = np.searchsorted(others, clicks, side="left")
    not_above = np.searchsorted(others, clicks, side="right")
    return float((below + not_above).mean() / (2 * len(others)))
