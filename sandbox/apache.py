"""Runs a real Apache Kafka (KRaft, one node) as a child process, with the installed Java.

Kafka's jars come from KAFKA_HOME, or are downloaded once with Maven into a cache. `python -m sandbox.apache` downloads
the jars in advance, and lets Java archive their classes, which halves the CPU time of a broker's start.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from sandbox.processes import Process, StandInError, free_port, port_open

VERSION = "4.3.1"
_LOG4J = "2.25.4"  # the version in Kafka's jars; the jars lack Log4j's adapter for SLF4J
_CLUSTER_ID = "ZnJhdWQtYWxhcm0tZGVtbw"  # any 16 bytes in base64
_OLDEST_JAVA = 17
_LISTENER = "PLAINTEXT"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>kafka-jars</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>{_LOG4J}</version></dependency>
  </dependencies>
</project>
"""

_LOGGING = """\
Configuration:
  status: ERROR
  Appenders:
    Console: {name: STDOUT, PatternLayout: {pattern: "%d %p %m (%c)%n"}}
  Loggers:
    Root: {level: WARN, AppenderRef: {ref: STDOUT}}
"""


class ApacheKafka(Process):
    """A broker, which is also its own controller, on 127.0.0.1. Its port and records survive stop, kill and restart.

    `settings` override the broker's server.properties. `java_options` are further options of the command `java`.
    """

    _release = "of KAFKA_HOME" if os.environ.get("KAFKA_HOME") else VERSION
    description = f"Apache Kafka {_release}: exactly once, with real transactions"

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        java_options: Sequence[str] = (),
    ) -> None:
        self._directory = directory
        self._port = port or free_port()
        self._properties = _server_properties(directory, self._port, free_port()) | dict(settings or {})
        super().__init__(
            "Apache Kafka",
            [*_java(directory, *java_options), "kafka.Kafka", str(directory / "server.properties")],
            log=directory / "kafka.log",
            ready=self._answers,
        )

    @property
    def bootstrap(self) -> str:
        """The broker's address, HOST:PORT."""
        return f"127.0.0.1:{self._port}"

    def spawn(self) -> None:
        """Start the broker. Before the first start, format the broker's storage."""
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "log4j2.yaml").write_text(_LOGGING)
        properties = "".join(f"{name}={value}\n" for name, value in self._properties.items())
        (self._directory / "server.properties").write_text(properties)
        if not (self._directory / "records" / "meta.properties").exists():
            _format(self._directory)
        super().spawn()

    def _answers(self) -> bool:
        if not port_open(self._port):
            return False
        try:
            AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0}).list_topics(timeout=5)
        except KafkaException:
            return False
        return True


def missing() -> str | None:
    """Return which requirement of Apache Kafka this machine does not meet, or None if it meets all of them."""
    if (version := _java_version()) is None or version < _OLDEST_JAVA:
        return f"Java {_OLDEST_JAVA} or newer is missing"
    if _jars().is_dir():
        return None
    if os.environ.get("KAFKA_HOME"):
        return f"KAFKA_HOME has no libs folder: {_jars()}"
    return None if shutil.which("mvn") else "Maven (to fetch Kafka's jars once) or KAFKA_HOME is missing"


def fetch() -> Path:
    """Return the folder of Kafka's jars. If the folder does not exist, download the jars with Maven.

    Raises StandInError if Kafka cannot run on this machine, or if the download fails.
    """
    if reason := missing():
        raise StandInError(f"Apache Kafka cannot run here: {reason}")
    jars = _jars()
    if jars.is_dir():
        return jars
    jars.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=jars.parent) as workshop:
        Path(workshop, "pom.xml").write_text(_POM)
        command = [
            "mvn",
            "-q",
            "-B",
            "dependency:copy-dependencies",
            "-DincludeScope=runtime",
            "-DoutputDirectory=libs",
        ]
        done = subprocess.run(command, cwd=workshop, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stdout.splitlines() if "ERROR" in line), "no reason given")
            raise StandInError(f"Maven could not fetch Apache Kafka {VERSION}: {first}")
        try:
            Path(workshop, "libs").rename(jars)
        except OSError:  # another process has downloaded the jars in the meantime
            if not jars.is_dir():
                raise
    return jars


def _jars() -> Path:
    if home := os.environ.get("KAFKA_HOME"):
        return Path(home) / "libs"
    return _cache() / f"kafka-{VERSION}"


def _archive() -> Path:
    """Return the path of Java's archive of Kafka's classes. Java ignores an archive made from other jars, or by another
    version of Java.
    """
    return _cache() / f"kafka-{VERSION}.jsa"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fraud-alarm"


def _make_archive() -> None:
    """Start and stop a broker, so that Java archives the classes that the broker has loaded.

    See "class data sharing" in the manual page of `java`. Raises StandInError if the broker does not start.
    """
    with tempfile.TemporaryDirectory(dir=_cache()) as directory:
        partial = Path(directory, "partial")
        with ApacheKafka(Path(directory), java_options=[f"-XX:ArchiveClassesAtExit={partial}"]):
            pass
        with suppress(FileNotFoundError):  # Java writes no archive if its own base archive is missing
            partial.rename(_archive())


def _java_version() -> int | None:
    java = shutil.which("java")
    if java is None:
        return None
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', answer)
    return int(found[1]) if found else None


def _java(directory: Path, *options: str) -> list[str]:
    return [
        "java",
        *options,
        "-Xmx512m",
        "-Xshare:auto",
        *([f"-XX:SharedArchiveFile={_archive()}"] if _archive().exists() else []),
        "-XX:TieredStopAtLevel=1",  # Kafka starts faster, and leaves the cores to the services
        "-XX:+UseSerialGC",
        f"-Dlog4j2.configurationFile={directory / 'log4j2.yaml'}",
        "-cp",
        f"{fetch()}/*",
    ]


def _format(directory: Path) -> None:
    command = ["kafka.tools.StorageTool", "format", "--standalone", "-t", _CLUSTER_ID, "-c"]
    done = subprocess.run(
        [*_java(directory), *command, str(directory / "server.properties")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StandInError(f"Apache Kafka could not format its storage: {(done.stderr or done.stdout).strip()[-300:]}")


def _server_properties(directory: Path, port: int, controller_port: int) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
        "listeners": f"{_LISTENER}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"{_LISTENER}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": str(directory / "records"),
        "num.partitions": "6",
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "3",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "3",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "num.network.threads": "2",
        "num.io.threads": "2",
        "log.cleaner.enable": "false",
        # A restarted broker must wait until its old registration expires. A short session makes restarts fast.
        "broker.heartbeat.interval.ms": "500",
        "broker.session.timeout.ms": "3000",
    }


if __name__ == "__main__":
    try:
        sys.stdout.write(f"Apache Kafka {VERSION}: {fetch()}\n")
        if not _archive().exists():
            _make_archive()
    except StandInError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
