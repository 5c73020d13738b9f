"""A manifest says how a picture was made, in a form that others read, and shows when the picture was changed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from generator.certificate import CertificateRefused, SigningIdentity, _builder, load_identity, trusted_anchors
from generator.jumbf import without_manifest
from generator.manifest import ManifestRefused, ManifestSigner, ManifestUnreadable, read_manifest
from generator.settings import SigningSettings
from generator.storage import ImageStore, MetadataValue, content_sha256, local_path, read_metadata, read_source_type
from tests.generator.stored import put

NOW_MS = time.time_ns() // 1_000_000
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"
METADATA: dict[str, MetadataValue] = {
    "creative_id": "gen-1",
    "product_id": "p-1",
    "group_id": 3,
    "caused_by": "shift-1",
    "renderer": "procedural",
    "version": "1",
    "prompt": "sunlit beach background for a “kettle” & <b>",
    "prompt_sha256": hashlib.sha256(b"x").hexdigest(),
    "digital_source_type": SOURCE_TYPE,
}
MEDIA_TYPES = {"jpeg": "image/jpeg", "png": "image/png"}


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((96, 96)).convert("RGB")


def development(folder: Path) -> tuple[SigningIdentity, SigningSettings]:
    settings = SigningSettings(folder=folder)
    identity = load_identity(settings, now_ms=NOW_MS)
    assert identity is not None
    return identity, settings


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> SigningIdentity:
    return development(tmp_path_factory.mktemp("signing") / "made")[0]


@pytest.fixture(scope="module")
def signer(identity: SigningIdentity) -> ManifestSigner:
    return ManifestSigner(identity)


@pytest.fixture(params=["jpeg", "png"])
def image_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stored(tmp_path: Path, signer: ManifestSigner, image_format: str) -> Path:
    """Return the file of a signed creative."""
    store = ImageStore(str(tmp_path / "creatives"), image_format=image_format, signer=signer)
    path = local_path(put(store, picture(), METADATA).uri)
    assert path is not None
    return path


def test_c2pas_own_reader_reads_what_was_signed(stored: Path, identity: SigningIdentity, image_format: str) -> None:
    trust = {"trust": {"user_anchors": identity.anchors.decode()}}
    with (
        stored.open("rb") as file,
        c2pa.Reader(MEDIA_TYPES[image_format], file, context=c2pa.Context.from_dict(trust)) as reader,
    ):
        assert reader.get_validation_state() == "Trusted"
        (manifest,) = json.loads(reader.json())["manifests"].values()
    assertions = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
    assert assertions["osmf.creative"] == METADATA
    (action,) = assertions["c2pa.actions.v2"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE_TYPE)
    assert action["softwareAgent"] == {"name": "OSMF procedural", "version": "1"}
    assert manifest["claim_generator_info"][0]["name"] == "OSMF"
    assert manifest["signature_info"]["issuer"] == "OSMF"


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_exiftool_reads_the_label(stored: Path) -> None:
    said = subprocess.run(["exiftool", "-j", "-n", stored], capture_output=True, check=True, text=True).stdout
    (tags,) = json.loads(said)
    assert tags["DigitalSourceType"] == SOURCE_TYPE
    assert tags["Description"] == "AI-generated"


def test_pillow_opens_a_signed_file_and_its_label_is_as_it_was(stored: Path) -> None:
    payload = stored.read_bytes()
    with Image.open(stored) as opened:
        opened.load()
        assert opened.size == (96, 96)
    assert read_metadata(payload) == METADATA
    assert read_source_type(payload) == SOURCE_TYPE


def test_a_signed_file_without_its_manifest_is_the_file_that_was_signed(
    stored: Path, signer: ManifestSigner, image_format: str
) -> None:
    unsigned = ImageStore("unused", image_format=image_format).encode(picture(), METADATA)
    signed = stored.read_bytes()
    assert without_manifest(signed) == without_manifest(unsigned) == unsigned != signed
    assert stored.stem == hashlib.sha256(unsigned).hexdigest() == content_sha256(signed)
    again = signer.sign(unsigned, MEDIA_TYPES[image_format], METADATA)
    assert again != signed  # which is why a file is not named by all of its bytes
    assert content_sha256(again) == stored.stem


def test_the_same_picture_keeps_the_file_that_is_there(tmp_path: Path, signer: ManifestSigner) -> None:
    store = ImageStore(str(tmp_path), signer=signer)
    payload = store.encode(picture(), METADATA)
    first = put(store, payload, METADATA)
    assert put(store, payload, METADATA) == first
    assert first.sha256 == hashlib.sha256(store.read(first.uri)).hexdigest()
    path = local_path(first.uri)
    assert path is not None
    path.write_bytes(path.read_bytes()[:400])  # in the middle of the manifest
    second = put(store, payload, METADATA)
    assert second.uri == first.uri
    assert read_manifest(store.read(second.uri), "image/jpeg", anchors=b"") is not None


def test_a_manifest_is_trusted_by_those_who_know_the_signer(
    stored: Path, identity: SigningIdentity, image_format: str, tmp_path: Path
) -> None:
    other, _ = development(tmp_path / "other")
    for anchors, state in ((identity.anchors, "trusted"), (other.anchors, "untrusted"), (b"", "untrusted")):
        manifest = read_manifest(stored.read_bytes(), MEDIA_TYPES[image_format], anchors=anchors)
        assert manifest is not None
        assert (manifest.state, manifest.record) == (state, METADATA)
        assert manifest.signer.startswith("OSMF, OSMF development ")
        assert (manifest.algorithm.lower(), manifest.actions) == ("ed25519", (f"c2pa.created ({SOURCE_TYPE})",))


def test_no_change_of_the_picture_or_of_its_record_is_trusted(
    stored: Path, identity: SigningIdentity, image_format: str
) -> None:
    payload = stored.read_bytes()
    n_found = 0
    for at in range(0, len(payload), 37):
        changed = bytearray(payload)
        changed[at] ^= 0x10
        try:
            manifest = read_manifest(bytes(changed), MEDIA_TYPES[image_format], anchors=identity.anchors)
        except ManifestUnreadable:
            continue
        if manifest is None or manifest.state != "trusted":
            n_found += manifest is not None and manifest.state == "invalid" and bool(manifest.problems)
            continue
        # A few bytes of the manifest's boxes mean nothing, and may be any.
        assert without_manifest(bytes(changed)) == without_manifest(payload), at
        assert manifest.record == METADATA, at
    assert n_found > 30


def test_a_picture_of_other_people_has_no_manifest() -> None:
    out = io.BytesIO()
    picture().save(out, "JPEG")
    assert read_manifest(out.getvalue(), "image/jpeg", anchors=b"") is None


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xeb", b"\x89PNG\r\n\x1a\n"]))
def test_no_bytes_break_the_reading_of_boxes(payload: bytes, start: bytes) -> None:
    kept = without_manifest(start + payload)
    assert without_manifest(kept) == kept
    assert len(kept) <= len(start + payload)


def test_a_development_certificate_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "signing"
    first, settings = development(folder)
    assert development(folder)[0] == first
    assert trusted_anchors(settings) == first.anchors
    assert (folder / "key.pem").stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in folder.iterdir()) == ["certificate.pem", "key.pem"]
    assert [path.name for path in folder.parent.iterdir()] == ["signing"]
    leaf, authority = x509.load_pem_x509_certificates(first.chain)
    leaf.verify_directly_issued_by(authority)
    assert leaf.not_valid_after_utc.timestamp() > NOW_MS / 1000 + 9 * 365 * 86_400


def test_nothing_is_made_by_who_only_reads(tmp_path: Path) -> None:
    assert trusted_anchors(SigningSettings(folder=tmp_path / "none")) == b""
    assert load_identity(SigningSettings(mode="off", folder=tmp_path / "none"), now_ms=NOW_MS) is None
    assert not (tmp_path / "none").exists()


def issue(folder: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, **usage: bool) -> SigningSettings:
    """Write a certificate of somebody's own authority, and return the settings that name it."""
    from datetime import UTC, datetime

    authority = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(NOW_MS / 1000, UTC)
    names = [
        x509.Name(
            [
                x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Shop"),
                x509.NameAttribute(x509.NameOID.COMMON_NAME, name),
            ]
        )
        for name in ("Shop authority", "Shop creatives")
    ]
    bits = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    chain = b""
    for subject, owner, is_authority in ((names[1], key, False), (names[0], authority, True)):
        used = {"key_cert_sign": True} if is_authority else {"digital_signature": True, **usage}
        built = (
            _builder(subject, names[0], owner.public_key(), now)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.KeyUsage(**{**bits, **used}), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        if not is_authority:
            usages = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            built = built.add_extension(usages, critical=False)
        chain += built.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)
    folder.mkdir(exist_ok=True)
    (folder / "own.pem").write_bytes(chain)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "own.key").write_bytes(pem)
    return SigningSettings(mode="own", certificate=folder / "own.pem", private_key=folder / "own.key")


@pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        (lambda: ec.generate_private_key(ec.SECP256R1()), "es256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), "es384"),
        (lambda: rsa.generate_private_key(65537, 2048), "ps256"),
    ],
)
def test_ones_own_certificate_signs(tmp_path: Path, make: Callable[[], rsa.RSAPrivateKey], algorithm: str) -> None:
    settings = issue(tmp_path, make())
    own = load_identity(settings, now_ms=NOW_MS)
    assert own is not None
    assert own.algorithm == algorithm
    store = ImageStore(str(tmp_path / "creatives"), signer=ManifestSigner(own))
    payload = store.read(put(store, picture(), METADATA).uri)
    manifest = read_manifest(payload, "image/jpeg", anchors=trusted_anchors(settings))
    assert manifest is not None
    assert (manifest.state, manifest.signer) == ("trusted", "Shop, Shop creatives")
    # Somebody else trusts it, too, once told to.
    (tmp_path / "shop.pem").write_bytes(own.anchors)
    reader = SigningSettings(folder=tmp_path / "none", trust_anchors=tmp_path / "shop.pem")
    manifest = read_manifest(payload, "image/jpeg", anchors=trusted_anchors(reader))
    assert manifest is not None
    assert manifest.state == "trusted"


def _damage_key(folder: Path) -> None:
    (folder / "own.key").write_bytes(b"none")


def _other_key(folder: Path) -> None:
    certificate = (folder / "own.pem").read_bytes()
    issue(folder, ec.generate_private_key(ec.SECP256R1()))
    (folder / "own.pem").write_bytes(certificate)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "own.pem").unlink(), "No such file"),
        (lambda folder: (folder / "own.pem").write_bytes(b"none"), "no certificates in PEM"),
        (_damage_key, "no private key without a password"),
        (_other_key, "not the key of the first certificate"),
        (lambda folder: issue(folder, ec.generate_private_key(ec.SECP224R1())), "allowed are EC"),
        (lambda folder: issue(folder, rsa.generate_private_key(65537, 1024)), "allowed are EC"),
    ],
)
def test_a_certificate_that_cannot_sign_is_refused(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    settings = issue(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    harm(tmp_path)
    with pytest.raises(CertificateRefused, match=f"{reason}.*Nothing was published"):
        load_identity(settings, now_ms=NOW_MS)


def test_a_certificate_for_another_use_is_refused_at_once(tmp_path: Path) -> None:
    settings = issue(tmp_path, ec.generate_private_key(ec.SECP256R1()), digital_signature=False, key_agreement=True)
    identity = load_identity(settings, now_ms=NOW_MS)
    assert identity is not None
    with pytest.raises(ManifestRefused, match="C2PA refused to sign"):
        ManifestSigner(identity)


def test_own_needs_both_files() -> None:
    with pytest.raises(ValueError, match="needs both certificate and private_key"):
        SigningSettings(mode="own", certificate=Path("own.pem"))
