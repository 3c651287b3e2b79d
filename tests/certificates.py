"""A certificate authority of the tests' own, and what it signs."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_HERE: Sequence[x509.GeneralName] = (x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1")))


class Authority:
    """Signs certificates that are valid for an hour, and keeps each as a PEM file, its key in front."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.path = directory / f"{name}.pem"
        names = _named(name)
        builder = _builder(names, names, self._key, valid_s=3600).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, name: str = "server", *, host: str | None = None, expired: bool = False) -> Path:
        """For 127.0.0.1 and localhost, or for another host."""
        names = _HERE if host is None else [x509.DNSName(host)]
        return self._signed(name, names=names, usage=ExtendedKeyUsageOID.SERVER_AUTH, valid_s=-60 if expired else 3600)

    def client(self, name: str) -> Path:
        """For whom Kafka calls `CN=name`."""
        return self._signed(name, names=(), usage=ExtendedKeyUsageOID.CLIENT_AUTH, valid_s=3600)

    def _signed(
        self, name: str, *, names: Sequence[x509.GeneralName], usage: x509.ObjectIdentifier, valid_s: int
    ) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_named(name), self.certificate.subject, key, valid_s=valid_s)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        path = self._directory / f"{self._name}-{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(private + public)
        return path


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, valid_s: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(seconds=valid_s))
    )
