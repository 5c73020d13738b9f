"""Manifests: C2PA content credentials, which say inside a file who made it and how, and are signed.

A signature is not reproducible: C2PA salts its boxes at random, so signing a picture twice gives two files. A picture
is therefore named by its file as it was before it was signed, and one that is there already is kept
(:meth:`generator.storage.ImageStore.prepare`).
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import c2pa
from PIL import Image

from generator.certificate import SigningIdentity
from generator.storage import DEFAULT_SOURCE_TYPE, MetadataValue

RECORD_LABEL: Final = "osmf.creative"
"""Label of the assertion that holds our own record."""

_BUILDING: Final = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"verify_after_sign": False}}


class ManifestRefused(RuntimeError):
    """C2PA cannot sign with a certificate, or cannot sign a file."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"C2PA refused to sign: {reason}. A certificate needs the usages digitalSignature and emailProtection "
            "(or documentSigning) and an issuer other than itself. Nothing was published."
        )


class ManifestSigner:
    """Signs pictures: puts a manifest into a file that says how it was made.

    Parameters
    ----------
    identity
        Who signs.

    Raises
    ------
    ManifestRefused
        C2PA does not take the certificate: it is tried at once, not with the first creative.
    """

    def __init__(self, identity: SigningIdentity) -> None:
        self._identity = identity
        self._context = c2pa.Context.from_dict(_BUILDING)
        trial = io.BytesIO()
        Image.new("RGB", (8, 8)).save(trial, "PNG")
        self.sign(trial.getvalue(), "image/png", {})

    def sign(self, payload: bytes, media_type: str, metadata: Mapping[str, MetadataValue]) -> bytes:
        """Return the file with a manifest; its other bytes are as they were.

        Parameters
        ----------
        payload
            The picture's file, without a manifest.
        media_type
            Such as ``image/jpeg``.
        metadata
            How it was made: all of it becomes the assertion ``osmf.creative``.

        Raises
        ------
        ManifestRefused
            The file cannot be signed.
        """
        agent = {"name": f"OSMF {metadata.get('renderer', 'unknown')}", "version": str(metadata.get("version", ""))}
        created = {
            "action": "c2pa.created",
            "digitalSourceType": metadata.get("digital_source_type") or DEFAULT_SOURCE_TYPE,
            "softwareAgent": agent,
        }
        definition = {
            "claim_generator_info": [{"name": "OSMF"}],
            "title": str(metadata.get("creative_id", "")),
            "format": media_type,
            "instance_id": f"xmp:iid:{uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(payload).hexdigest())}",
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": RECORD_LABEL, "data": dict(metadata)},
            ],
        }
        identity, signed = self._identity, io.BytesIO()
        info = c2pa.C2paSignerInfo(identity.algorithm, identity.chain, identity.private_key, None)
        try:
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder.from_json(definition, self._context) as builder:
                builder.sign(signer, media_type, io.BytesIO(payload), signed)
        except c2pa.C2paError as error:
            raise ManifestRefused(str(error)) from error
        return signed.getvalue()


ManifestState = Literal["trusted", "untrusted", "invalid"]
"""A manifest whose signature holds and whose signer is known, is not known, or that does not fit its file."""


@dataclass(frozen=True)
class Manifest:
    """What a file's manifest says, and whether it holds.

    Parameters
    ----------
    state
        Whether to believe it.
    problems
        What does not hold: C2PA's code and an explanation of each.
    signer, algorithm
        The certificate's issuer and name, and how it signed.
    actions
        What was done to the picture, such as ``c2pa.created``, and C2PA's digital source type of it.
    record
        Our own record of how it was made; empty for other people's files.
    """

    state: ManifestState
    problems: tuple[str, ...]
    signer: str
    algorithm: str
    actions: tuple[str, ...]
    record: dict[str, MetadataValue]


class ManifestUnreadable(ValueError):
    """A file whose manifest is too damaged to be read."""


def read_manifest(payload: bytes, media_type: str, *, anchors: bytes) -> Manifest | None:
    """Read and verify a file's manifest; None where it has none.

    Parameters
    ----------
    payload, media_type
        The file.
    anchors
        Certificates, PEM, whose signatures are trusted.

    Raises
    ------
    ManifestUnreadable
        There is one, and it cannot be read.
    """
    verifying: dict[str, Any] = {"verify": {"verify_trust": True, "remote_manifest_fetch": False}}
    if anchors:
        verifying["trust"] = {"user_anchors": anchors.decode()}
    try:
        with c2pa.Reader(media_type, io.BytesIO(payload), context=c2pa.Context.from_dict(verifying)) as reader:
            found = json.loads(reader.json())
            state = reader.get_validation_state()
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        raise ManifestUnreadable(f"its C2PA manifest cannot be read ({error})") from error
    active: dict[str, Any] | None = found.get("manifests", {}).get(found.get("active_manifest"))
    if active is None:
        raise ManifestUnreadable("its C2PA manifest cannot be read (the one that it calls the active one is not there)")
    failures = found.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    problems = tuple(f"{failure['code']}: {failure.get('explanation', '')}" for failure in failures)
    assertions: dict[str, Any] = {each["label"]: each.get("data") for each in active.get("assertions", [])}
    actions: list[dict[str, Any]] = next(
        (data["actions"] for label, data in assertions.items() if label.startswith("c2pa.actions")), []
    )
    signature = active.get("signature_info", {})
    states: dict[str | None, ManifestState] = {"Trusted": "trusted", "Valid": "untrusted"}
    return Manifest(
        state=states.get(state, "invalid"),
        problems=problems,
        signer=f"{signature.get('issuer', 'unknown')}, {signature.get('common_name', 'unknown')}",
        algorithm=str(signature.get("alg", "unknown")),
        actions=tuple(
            f"{action['action']} ({action.get('digitalSourceType', 'no source type')})" for action in actions
        ),
        record=assertions.get(RECORD_LABEL) or {},
    )
