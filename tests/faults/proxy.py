"""A proxy between clients and the local broker, which does to them what the local broker cannot do by itself.

It cuts connections, hides partitions that a topic gains later, and lets the beginning of a log expire. Everything else
goes through as it is, so that what is tested is the real client against the real broker.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from kafka.protocol.consumer import FetchRequest, FetchResponse, ListOffsetsRequest, ListOffsetsResponse
from kafka.protocol.metadata import FindCoordinatorResponse, MetadataResponse

HOST = "127.0.0.1"
OFFSET_OUT_OF_RANGE = 1
EARLIEST = -2

_REQUEST = struct.Struct(">ihhi")  # size, API key, API version, correlation id
_SIZE = struct.Struct(">i")


class BrokerProxy:
    """Stands in front of a broker; clients that bootstrap here meet nobody else.

    Attributes
    ----------
    visible
        How many partitions of a topic clients are told of; of others all.
    first_offsets
        Where the log of a (topic, partition) begins: what is before it has expired.
    """

    def __init__(self, bootstrap_servers: str) -> None:
        self._upstream = (HOST, int(bootstrap_servers.rpartition(":")[2]))
        self._listener = socket.create_server((HOST, 0))
        self._port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._topic_names: dict[Any, str] = {}
        self._is_cut = False
        self.visible: dict[str, int] = {}
        self.first_offsets: dict[tuple[str, int], int] = {}
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def bootstrap_servers(self) -> str:
        return f"{HOST}:{self._port}"

    def cut(self) -> None:
        """Drop every connection, and every further one, until `mend`."""
        self._is_cut = True
        for pair in self._pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def mend(self) -> None:
        self._is_cut = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        asked: dict[int, tuple[int, int, bytes]] = {}
        with client, socket.create_connection(self._upstream) as server:
            self._pairs.append((client, server))
            there = threading.Thread(target=_pump, args=(client, server, lambda frame: _note(frame, asked)))
            there.start()
            _pump(server, client, lambda frame: self._answer(frame, asked))
            there.join()

    def _answer(self, frame: bytes, asked: dict[int, tuple[int, int, bytes]]) -> bytes:
        key, version, request = asked.pop(_SIZE.unpack_from(frame, 4)[0])
        if key == MetadataResponse.API_KEY:
            return self._edit(MetadataResponse, frame, version, self._edit_metadata)
        if key == FindCoordinatorResponse.API_KEY:
            return self._edit(FindCoordinatorResponse, frame, version, self._edit_coordinator)
        if key == ListOffsetsResponse.API_KEY and self.first_offsets:
            earliest = {
                (topic.name, each.partition_index)
                for topic in ListOffsetsRequest.decode(request, version=version, header=True, framed=True).topics
                for each in topic.partitions
                if each.timestamp == EARLIEST
            }
            return self._edit(ListOffsetsResponse, frame, version, lambda r: self._edit_offsets(r, earliest))
        if key == FetchResponse.API_KEY and self.first_offsets:
            gone = {
                (each_topic.topic or each_topic.topic_id, each.partition)
                for each_topic in FetchRequest.decode(request, version=version, header=True, framed=True).topics
                for each in each_topic.partitions
                if each.fetch_offset < self._first(each_topic, each.partition)
            }
            return self._edit(FetchResponse, frame, version, lambda r: _edit_fetch(r, gone)) if gone else frame
        return frame

    def _first(self, topic: Any, partition: int) -> int:
        name = topic.topic or self._topic_names.get(topic.topic_id, "")
        return self.first_offsets.get((name, partition), 0)

    def _edit(self, kind: Any, frame: bytes, version: int, edit: Callable[[Any], None]) -> bytes:
        response = kind.decode(frame, version=version, header=True, framed=True)
        edit(response)
        response.with_header(correlation_id=_SIZE.unpack_from(frame, 4)[0])
        return bytes(response.encode(header=True, framed=True))

    def _edit_metadata(self, response: Any) -> None:
        for broker in response.brokers:
            broker.host, broker.port = HOST, self._port
        for topic in response.topics:
            self._topic_names[topic.topic_id] = topic.name
            n_visible = self.visible.get(topic.name, len(topic.partitions))
            topic.partitions = [each for each in topic.partitions if each.partition_index < n_visible]

    def _edit_coordinator(self, response: Any) -> None:
        if response.host:
            response.host, response.port = HOST, self._port
        for each in response.coordinators or ():
            each.host, each.port = HOST, self._port

    def _edit_offsets(self, response: Any, earliest: set[tuple[str, int]]) -> None:
        for topic in response.topics:
            for each in topic.partitions:
                name = (topic.name, each.partition_index)
                if name in earliest:
                    each.offset = max(each.offset, self.first_offsets.get(name, 0))

    def __enter__(self) -> BrokerProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()


def _edit_fetch(response: Any, gone: set[tuple[Any, int]]) -> None:
    for topic in response.responses:
        for each in topic.partitions:
            if (topic.topic or topic.topic_id, each.partition_index) in gone:
                each.error_code, each.records = OFFSET_OUT_OF_RANGE, b""


def _note(frame: bytes, asked: dict[int, tuple[int, int, bytes]]) -> bytes:
    _, key, version, correlation_id = _REQUEST.unpack_from(frame)
    asked[correlation_id] = (key, version, frame)
    return frame


def _pump(source: socket.socket, target: socket.socket, edit: Callable[[bytes], bytes]) -> None:
    """Pass frames on, each as ``edit`` returns it, until either side ends."""
    try:
        with source.makefile("rb") as reader:
            while size := reader.read(_SIZE.size):
                target.sendall(edit(size + reader.read(_SIZE.unpack(size)[0])))
    except (OSError, ValueError):
        pass
    finally:
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
