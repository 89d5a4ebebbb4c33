"""The certificate authority of one cluster: made by `up`, gone with the cluster.

Each daemon gets a key and a certificate whose one DNS name says who it is
(`worker-3.<cluster_id>.dsgd`, see `contract.names`); a certificate of another cluster fails both
the signature and the name. Keys travel over stdin only. Certificates are valid from 25 hours ago,
so that a host whose clock is a day behind still accepts them.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dsgd_cli.contract import names

BACKDATED = datetime.timedelta(hours=25)
LIFETIME = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Authority:
    """A cluster's CA: PEM texts. `key` is as secret as the cluster."""

    cluster_id: str
    certificate: str
    key: str

    @property
    def pem(self) -> str:
        """Certificate and key in one text, as the coordinator's host keeps it."""
        return self.certificate + self.key

    @classmethod
    def from_pem(cls, cluster_id: str, text: str) -> Authority:
        """The authority whose `pem` this is."""
        certificate, begin, rest = text.partition("-----BEGIN PRIVATE KEY-----")
        return cls(cluster_id, certificate, begin + rest)

    def issue(self, process: str) -> dict[str, str]:
        """A new key and certificate for `worker/3`: {"ca", "cert", "key"}, PEM text."""
        ca = x509.load_pem_x509_certificate(self.certificate.encode())
        ca_key = serialization.load_pem_private_key(self.key.encode(), password=None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        dns = names.dns_name(process, self.cluster_id)
        certificate = (
            _builder(dns, ca.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        return {"ca": self.certificate, "cert": _pem(certificate), "key": _key_pem(key)}


def new_cluster_id() -> str:
    """16 random hex digits: a new one for each `up`."""
    return secrets.token_hex(8)


def make_authority(cluster_id: str) -> Authority:
    """A fresh CA for this cluster."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"ca.{cluster_id}.dsgd"
    certificate = (
        _builder(name, _name(name), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(cluster_id, _pem(certificate), _key_pem(key))


def _builder(
    subject: str, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + LIFETIME)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
