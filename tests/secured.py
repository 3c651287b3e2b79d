"""A real Apache Kafka behind TLS and logins, with the authorizer on, and a PostgreSQL with TLS."""

import os
from collections.abc import Iterable
from pathlib import Path

from certificates import Authority
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from sandbox.apache import ApacheKafka
from sandbox.postgres import Postgres
from sandbox.processes import free_port

OWNER = "owner"  # who may do anything
LISTENERS = ("PLAIN", "SCRAM", "MTLS", "EXPIRED", "ELSEWHERE")


def password_of(user: str) -> str:
    """What the user logs in with."""
    return f"pass-of-{user}"


class SecuredKafka(ApacheKafka):
    """One broker with a listener for each way in, beside the open one of its own, through which it is administered.

    EXPIRED and ELSEWHERE are like PLAIN, with a certificate that has expired, and with another host's.
    """

    def __init__(self, directory: Path, *, users: Iterable[str] = ()) -> None:
        self.authority = Authority(directory / "certificates")
        self._ports = {name: free_port() for name in LISTENERS}
        super().__init__(directory, settings=_settings(self.authority, (OWNER, *users)))
        more = "".join(f",{name}://127.0.0.1:{port}" for name, port in self._ports.items())
        for name in ("listeners", "advertised.listeners"):
            self._properties[name] += more

    def wait_ready(self) -> None:
        """Wait until it answers, then let the owner in by SCRAM: such logins lie in the cluster's own metadata."""
        super().wait_ready()
        login = UserScramCredentialUpsertion(
            OWNER, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), password_of(OWNER).encode()
        )
        admin = self.admin()
        for done in admin.alter_user_scram_credentials([login]).values():
            done.result(15)

    def admin(self) -> AdminClient:
        """A client that may do anything."""
        return AdminClient({"bootstrap.servers": self.bootstrap})

    def properties(self, listener: str, user: str = OWNER, **changes: str | None) -> dict[str, str]:
        """A user's client.properties for a listener; of the changes, with `_` for `.`, None takes a line away."""
        found: dict[str, str | None] = {
            "bootstrap.servers": f"127.0.0.1:{self._ports[listener]}",
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.authority.path),
        }
        if listener == "MTLS":
            certificate = str(self.authority.client(user))
            found |= {
                "security.protocol": "SSL",
                "ssl.certificate.location": certificate,
                "ssl.key.location": certificate,
            }
        else:
            mechanism = "SCRAM-SHA-512" if listener == "SCRAM" else "PLAIN"
            found |= {"sasl.mechanisms": mechanism, "sasl.username": user, "sasl.password": password_of(user)}
        found |= {name.replace("_", "."): value for name, value in changes.items()}
        return {name: value for name, value in found.items() if value is not None}


def _settings(authority: Authority, users: Iterable[str]) -> dict[str, str]:
    certificates = dict.fromkeys(LISTENERS, authority.server()) | {
        "EXPIRED": authority.server("expired", expired=True),
        "ELSEWHERE": authority.server("elsewhere", host="kafka.elsewhere.example"),
    }
    logins = "".join(f' user_{user}="{password_of(user)}"' for user in users)
    plain = f"org.apache.kafka.common.security.plain.PlainLoginModule required{logins};"
    protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"} | dict.fromkeys(LISTENERS, "SASL_SSL")
    protocols["MTLS"] = "SSL"
    settings = {
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:ANONYMOUS;User:{OWNER};User:CN={OWNER}",  # the first is who comes without a login
    }
    for name, certificate in certificates.items():
        own = {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(certificate),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority.path),
        }
        if name == "MTLS":
            own["ssl.client.auth"] = "required"
        elif name == "SCRAM":
            own["sasl.enabled.mechanisms"] = "SCRAM-SHA-512"
            own["scram-sha-512.sasl.jaas.config"] = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        else:
            own |= {"sasl.enabled.mechanisms": "PLAIN", "plain.sasl.jaas.config": plain}
        settings |= {f"listener.name.{name.lower()}.{key}": value for key, value in own.items()}
    return settings


def programs_with_tls() -> Path | None:
    """The folder of a PostgreSQL that was built with OpenSSL, as Debian's are; the bundled one was not."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


class SecuredPostgres(Postgres):
    """A PostgreSQL that offers TLS on 127.0.0.1."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self._certificate = authority.server("postgres")
        names = dict.fromkeys(("ssl_cert_file", "ssl_key_file"), str(self._certificate))
        super().__init__(directory, programs=programs_with_tls(), settings={"ssl": "on", **names})

    def spawn(self) -> None:
        """Start it, the owner of its key."""
        if self._account:
            os.chown(self._certificate, self._account.pw_uid, self._account.pw_gid)
            self._certificate.parent.chmod(0o711)
        super().spawn()
