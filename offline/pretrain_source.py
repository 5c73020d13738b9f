"""What the stream's state knows of products, groups and clickers, as pre-training needs it (section A.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.assignment import Assigner
from online.attributes import AttributeSchema
from online.clustering_record import unpack_clustering
from online.replay import unpack_rows
from online.settings import OnlineSettings
from state.reading import StateView
from state.records import N_FEATURE_POINTS, ClusteringRecord, ProfileTrait

Attributes = dict[str, str]
"""A user's attributes, or a group's most common ones, in words; what is not known is left out."""

_CLUSTERING = msgspec.msgpack.Decoder(ClusteringRecord)


@dataclass(frozen=True, eq=False, slots=True)
class GroupSource:
    """A group: its feature (11, 128), its members' most common attributes, what sets it apart, and who clicked.

    ``clickers`` are users outside the sample that the feature was made from: the next ones after those it stands for.
    """

    group_id: int
    feature: npt.NDArray[np.float32]
    typical: Attributes
    distinctive: list[ProfileTrait]
    clickers: list[Attributes]


@dataclass(frozen=True, eq=False, slots=True)
class ProductSource:
    """A product: its words, its pictures, its groups, and what is most common among all of its users.

    ``creative_uris`` are its creatives' images. The picture of the product itself comes first where there is one.
    """

    product_id: str
    title: str
    category: str | None
    image_uri: str | None
    creative_uris: list[str]
    typical: Attributes
    groups: list[GroupSource]

    @property
    def picture_uri(self) -> str | None:
        """Where to see the product: its own picture, else that of its first creative."""
        return self.image_uri or (self.creative_uris[0] if self.creative_uris else None)


def read_sources(view: StateView, online: OnlineSettings) -> list[ProductSource]:
    """Return the grouped products of a state, by id.

    Parameters
    ----------
    view
        The state at one commit.
    online
        The settings that it was built with.
    """
    schema = AttributeSchema(online.attributes)
    clickers = _clickers(view, online, schema)
    sources = []
    for product in view.products():
        groups, packed = view.groups(product.product_id), view.clustering(product.product_id)
        if groups is None or not groups.groups or packed is None:
            continue
        record = _CLUSTERING.decode(packed)
        ks = tuple(range(online.groups.k_min, online.groups.k_max + 1))
        clustering = unpack_clustering(record, ks, len(schema.names), online.model.d_model)
        labels = clustering.labels.get(record.k)
        sample = {user.tobytes() for user in clustering.attributes}
        of_groups = []
        for group in groups.groups:
            if labels is None or group.group_id not in record.group_ids:
                members = clustering.attributes
            else:
                members = clustering.attributes[labels == record.group_ids.index(group.group_id)]
            others = [
                in_words(codes, schema)
                for codes in clickers.get((product.product_id, group.group_id), [])
                if codes.tobytes() not in sample
            ]
            feature = np.frombuffer(group.feature, "<f4").reshape(N_FEATURE_POINTS, -1)
            of_groups.append(GroupSource(group.group_id, feature, most_common(members, schema), group.profile, others))
        uris = [creative.image_uri for creative in view.creatives(product.product_id) if creative.image_uri]
        sources.append(
            ProductSource(
                product.product_id,
                product.title,
                product.category,
                product.image_uri,
                uris,
                most_common(clustering.attributes, schema),
                of_groups,
            )
        )
    return sources


def most_common(users: npt.NDArray[np.uint8], schema: AttributeSchema) -> Attributes:
    """Return each attribute's most common known value among users (n, N); of values as common, the first listed."""
    found: Attributes = {}
    for position, name in enumerate(schema.names):
        counts = np.bincount(users[:, position], minlength=schema.cardinalities[position])
        known = [(int(n), -code) for code, n in enumerate(counts) if n and schema.word(position, code) is not None]
        if known:
            word = schema.word(position, -max(known)[1])
            assert word is not None
            found[name] = word
    return found


def in_words(codes: npt.NDArray[np.uint8], schema: AttributeSchema) -> Attributes:
    """Return one user's known attributes; codes (N,)."""
    words = [schema.word(position, int(code)) for position, code in enumerate(codes)]
    return {name: word for name, word in zip(schema.names, words, strict=True) if word is not None}


def kept_clicks(blocks: Iterable[bytes], n_fields: int) -> list[tuple[int, npt.NDArray[np.uint8]]]:
    """Return the clicks in blocks of replay: product number and user's codes (N,); without those taken back."""
    clicks: Counter[tuple[int, int, bytes]] = Counter()
    for block in blocks:
        labelled = unpack_rows(block, n_fields)
        rows = labelled.rows
        for row in np.flatnonzero(labelled.clicks > 0):
            click = int(rows.products[row]), int(rows.creatives[row]), rows.attributes[row].tobytes()
            clicks[click] += 1 if labelled.weights[row] > 0 else -1
    return [(product, np.frombuffer(codes, np.uint8)) for product, _, codes in clicks.elements()]


def _clickers(
    view: StateView, online: OnlineSettings, schema: AttributeSchema
) -> dict[tuple[str, int], list[npt.NDArray[np.uint8]]]:
    """Return the users of the kept clicks, by product and the group that they are in now; clicks taken back are out."""
    # Every shard numbers its products.
    products = {(view.shard_of(each.product_id), each.number): each.product_id for each in view.products()}
    ids: list[str] = []
    users: list[npt.NDArray[np.uint8]] = []
    for shard, blocks in view.replay_blocks().items():
        for number, codes in kept_clicks(blocks, len(schema.names)):
            ids.append(products[shard, number])
            users.append(codes)
    assigner = Assigner(online)
    assigner.load(view)
    group_ids: Sequence[int | None] = assigner.assign_many(ids, [in_words(codes, schema) for codes in users])
    found: dict[tuple[str, int], list[npt.NDArray[np.uint8]]] = {}
    for product_id, group_id, codes in zip(ids, group_ids, users, strict=True):
        if group_id is not None:
            found.setdefault((product_id, group_id), []).append(codes)
    return found
