"""Messages to bytes and back, by rules derived once from the annotations in `messages.py`.

A message is one msgpack array `[protocol_version, tag, field, ...]`. Decoding is led by the schema, one value at
a time: a container is only ever built where the schema has one, and never larger than the bytes that are left, so
that a small frame cannot unfold into a large object. Types are exact (an int is not a bool, a float not an int),
floats finite.

Knows: the closed table, its types and limits. Does not know: links, keys, or what a message means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Final, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgpack

from edge_runtime.errors import ProtocolError, VersionError
from edge_runtime.protocol import hot_messages
from edge_runtime.protocol.messages import (
    MAX_CONTROL_BYTES,
    MAX_ITEMS,
    MAX_STRING_BYTES,
    MESSAGE_TAGS,
    PROTOCOL_VERSION,
    Message,
    Refused,
)
from edge_runtime.transport.base import MAX_FRAME_BYTES, MAX_FRAMES, Frame

MAX_BYTES_FIELD = 1 << 20  # of one `bytes` field
MAX_NESTED_ITEMS = 1 << 16  # of one list whose items are lists or dataclasses

_NIL = 0xC0


class _Reader:
    """The values of one frame, in order. Whatever is not a plain scalar raises before it is built."""

    __slots__ = ("_frame", "_unpacker", "value")

    def __init__(self, frame: bytes | bytearray | memoryview) -> None:
        self._frame = frame
        # Fresh for every frame: an unpacker that raised once is in no state to be used again.
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, len(frame)),  # also the size of the buffer it allocates
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=MAX_BYTES_FIELD,
            list_hook=_refuse_container,
            object_hook=_refuse_container,
            ext_hook=_refuse_extension,
        )
        self._unpacker.feed(frame)
        self.value: Callable[[], Any] = self._unpacker.unpack

    def count(self, limit: int) -> int:
        """The length of the list that starts here; each of its items takes at least one of the bytes left."""
        count = int(self._unpacker.read_array_header())
        if count > limit or count > len(self._frame) - self._unpacker.tell():
            raise ValueError(f"a list of {count} items, more than allowed or than the frame holds")
        return count

    def next_is_nil(self) -> bool:
        at = self._unpacker.tell()
        return bool(at < len(self._frame) and self._frame[at] == _NIL)

    def at_end(self) -> bool:
        return bool(self._unpacker.tell() == len(self._frame))


def _refuse_container(_value: object) -> object:
    raise ValueError("a list or map where a plain value belongs")


def _refuse_extension(_code: int, _data: bytes) -> object:
    raise ValueError("a msgpack extension type")


class _Rule(NamedTuple):
    """How one annotated type travels. Both directions raise ValueError on a value the type does not have."""

    pack: Callable[[Any], Any]
    read: Callable[[_Reader], Any]
    scalar: type | None = None


def _scalar(kind: type, check: Callable[[Any], Any]) -> _Rule:
    return _Rule(pack=check, read=lambda reader: check(reader.value()), scalar=kind)


def _check_int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"an integer is needed, not {type(value).__name__}")
    return value  # its 64-bit range is msgpack's own


def _check_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"a boolean is needed, not {type(value).__name__}")
    return value


def _check_float(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise ValueError(f"a finite float is needed, not {value!r:.40}")
    return value


def _pack_float(value: Any) -> float:
    return _check_float(float(value) if type(value) is int else value)  # `temperature=0` is fine to write


def _check_str(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_STRING_BYTES:
        raise ValueError(f"a string of at most {MAX_STRING_BYTES} bytes is needed")
    return value


def _pack_str(value: Any) -> str:
    if len(_check_str(value).encode()) > MAX_STRING_BYTES:
        raise ValueError(f"a string of at most {MAX_STRING_BYTES} bytes is needed")
    return str(value)


def _check_bytes(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_BYTES_FIELD:
        raise ValueError(f"a byte string of at most {MAX_BYTES_FIELD} bytes is needed")
    return value


_SCALARS: Final[dict[Any, _Rule]] = {
    int: _scalar(int, _check_int),
    bool: _scalar(bool, _check_bool),
    float: _scalar(float, _check_float)._replace(pack=_pack_float),
    str: _scalar(str, _check_str)._replace(pack=_pack_str),
    bytes: _scalar(bytes, _check_bytes),
}


def _rule(annotation: Any) -> _Rule:
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            item = _rule(arguments[0])
            return _int_list() if item.scalar is int else _list_of(item)
        return _record(tuple, lambda value: value, [_rule(a) for a in arguments])
    if origin in (UnionType, Union) and len(arguments) == 2 and arguments[1] is NoneType:
        return _optional(_rule(arguments[0]))
    if is_dataclass(annotation) and isinstance(annotation, type):
        return _record(annotation, _values_of(annotation), _field_rules(annotation))
    raise TypeError(f"messages can't carry {annotation!r}: add a rule for it or use another type")


def _field_rules(cls: type) -> list[_Rule]:
    hints = get_type_hints(cls)
    return [_rule(hints[f.name]) for f in fields(cls)]


def _values_of(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    names = [f.name for f in fields(cls)]
    getter = attrgetter(*names)
    return (lambda value: (getter(value),)) if len(names) == 1 else getter


def _int_list() -> _Rule:
    """Ids and parents: the long lists. Types are checked in one sweep instead of one call per item."""

    def check(items: Sequence[Any]) -> tuple[int, ...]:
        if set(map(type, items)) - {int}:
            raise ValueError("a list of integers holds something else")
        return tuple(items)

    def pack(value: Any) -> tuple[int, ...]:
        if type(value) is not tuple or len(value) > MAX_ITEMS:
            raise ValueError(f"a tuple of at most {MAX_ITEMS} integers is needed")
        return check(value)

    def read(reader: _Reader) -> tuple[int, ...]:
        value = reader.value
        return check([value() for _ in range(reader.count(MAX_ITEMS))])

    return _Rule(pack, read)


def _list_of(item: _Rule) -> _Rule:
    pack_item, read_item = item.pack, item.read

    def pack(value: Any) -> list[Any]:
        if type(value) is not tuple or len(value) > MAX_NESTED_ITEMS:
            raise ValueError(f"a tuple of at most {MAX_NESTED_ITEMS} items is needed")
        return [pack_item(v) for v in value]

    def read(reader: _Reader) -> tuple[Any, ...]:
        return tuple([read_item(reader) for _ in range(reader.count(MAX_NESTED_ITEMS))])

    return _Rule(pack, read)


def _record(cls: type, values_of: Callable[[Any], tuple[Any, ...]], rules: list[_Rule]) -> _Rule:
    """A dataclass or a tuple of fixed length. The dataclass's own invariants hold for received values, too."""
    packs, reads, size = [r.pack for r in rules], [r.read for r in rules], len(rules)

    def pack(value: Any) -> list[Any]:
        if type(value) is not cls:
            raise ValueError(f"a {cls.__name__} is needed, not {type(value).__name__}")
        return [p(v) for p, v in zip(packs, values_of(value), strict=True)]

    def read(reader: _Reader) -> Any:
        if reader.count(size) != size:
            raise ValueError(f"{cls.__name__} has {size} fields")
        values = [r(reader) for r in reads]
        return tuple(values) if cls is tuple else cls(*values)

    return _Rule(pack, read)


def _optional(rule: _Rule) -> _Rule:
    def read(reader: _Reader) -> Any:
        if reader.next_is_nil():
            return reader.value()
        return rule.read(reader)

    return _Rule(lambda value: None if value is None else rule.pack(value), read)


class _Codec(NamedTuple):
    """One row of the closed table."""

    tag: int
    cls: Any
    packs: list[Callable[[Any], Any]]
    reads: list[Callable[[_Reader], Any]]
    values_of: Callable[[Any], tuple[Any, ...]]


def _codec(tag: int, cls: type[Message]) -> _Codec:
    rules = _field_rules(cls)
    return _Codec(tag, cls, [r.pack for r in rules], [r.read for r in rules], _values_of(cls))


_BY_TAG: Final = {tag: _codec(tag, cls) for tag, cls in MESSAGE_TAGS.items()}
_BY_TYPE: Final[dict[type, _Codec]] = {codec.cls: codec for codec in _BY_TAG.values()}


def encode_message(message: Message) -> bytes:
    """The message's own frame. Raises ProtocolError for a value that may not travel."""
    return hot_messages.encoded(message) or encode_by_schema(message)


def encode_by_schema(message: Message) -> bytes:
    """`encode_message` without its short cut."""
    codec = _BY_TYPE.get(type(message))
    if codec is None:
        raise ProtocolError(f"{type(message).__name__} is not a message")
    try:
        values = [PROTOCOL_VERSION, codec.tag]
        values += [pack(v) for pack, v in zip(codec.packs, codec.values_of(message), strict=True)]
        frame: bytes = msgpack.packb(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"{type(message).__name__} can't be sent: {error}") from error
    if len(frame) > MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} takes {len(frame)} bytes, more than {MAX_CONTROL_BYTES}"
        )
    return frame


def decode_message(frame: bytes | bytearray | memoryview) -> Message:
    """The message in one frame. Raises ProtocolError, and nothing else, whatever the bytes are."""
    return hot_messages.decoded(frame) or decode_by_schema(frame)


def decode_by_schema(frame: bytes | bytearray | memoryview) -> Message:
    """`decode_message` without its short cut."""
    if len(frame) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a message of {len(frame)} bytes, more than {MAX_CONTROL_BYTES}")
    name = "a message"
    try:
        reader = _Reader(frame)
        count = reader.count(MAX_ITEMS)
        version, tag = _check_int(reader.value()), _check_int(reader.value())
        codec = _BY_TAG.get(tag)
        _check_version(version, codec)
        if codec is None:
            raise ValueError(f"the tag {tag} is not in the table")
        name = str(codec.cls.__name__)
        if count != 2 + len(codec.reads):
            raise ValueError(f"{count - 2} fields instead of {len(codec.reads)}")
        message: Message = codec.cls(*[read(reader) for read in codec.reads])
        if not reader.at_end():
            raise ValueError("bytes after its end")
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"{name} can't be read: {str(error) or type(error).__name__}") from error
    return message


def _check_version(version: int, codec: _Codec | None) -> None:
    """`Refused` keeps its layout in every version, so that a refusal can always be read."""
    if version != PROTOCOL_VERSION and (codec is None or codec.cls is not Refused):
        older = "the other side" if version < PROTOCOL_VERSION else "this side"
        raise VersionError(
            f"the other side speaks protocol {version}, this side protocol {PROTOCOL_VERSION}",
            hint=f"update edge-runtime on {older}, so that both run the same version",
        )


def encode(message: Message, payloads: Sequence[Frame] = ()) -> list[Frame]:
    """The message's frame and, after it, the raw payload frames as they are."""
    if len(payloads) >= MAX_FRAMES:
        raise ProtocolError(f"{len(payloads)} payload frames, at most {MAX_FRAMES - 1} may travel together")
    return [encode_message(message), *payloads]


def decode(frames: Sequence[Frame]) -> tuple[Message, list[memoryview]]:
    """The message and its payload frames. Raises ProtocolError, and nothing else."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"{len(frames)} frames, a message has 1 to {MAX_FRAMES}")
    payloads = [memoryview(frame) for frame in frames[1:]]
    if payloads and max([payload.nbytes for payload in payloads]) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a payload frame of more than {MAX_FRAME_BYTES} bytes")
    return decode_message(frames[0]), payloads
