"""Settings in layers: defaults < TOML file < environment < flags; every value remembers where it came from.

The file is `$EDGE_RUNTIME_CONFIG`, or `~/.config/edge-runtime/config.toml` where that exists. A setting `port`
of section `coordinator` is `[coordinator] port` in it and `EDGE_RUNTIME_COORDINATOR_PORT` in the environment.

Knows: the settings, their defaults and how to read each. The only module that reads `os.environ`. Does not know: what
the settings are used for.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.errors import ConfigError
from edge_runtime.experts.prediction_setting import AUTO, SETTINGS
from edge_runtime.experts.start_bits import ALL_BITS, parse_start_bits

PREFIX = "EDGE_RUNTIME_"
CONFIG_FILE_VARIABLE = "EDGE_RUNTIME_CONFIG"

Parser = Callable[[object], object]  # raises ValueError with what is expected

# ---------------------------------------------------------------- readers of single values

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZES |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_DURATIONS = {"": 1.0, "ms": 1e-3, "us": 1e-6, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_size(value: object) -> int:
    """Bytes of 536870912, "512MiB", "1.5GB", "512M". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value), re.IGNORECASE)
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size such as 512MiB, 2GB or 1048576")
    return int(float(match[1]) * _SIZES[(match[2] or "").lower()])


def parse_duration(value: object) -> float:
    """Seconds of 2.5, "300ms", "2s", "10min", "1h". Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|min|m|h)?\s*", str(value), re.IGNORECASE)
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a duration such as 300ms, 2s or 10min")
    return float(match[1]) * _DURATIONS[(match[2] or "").lower()]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _path(value: object) -> Path:
    return Path(_text(str(value) if isinstance(value, Path) else value)).expanduser()


def _count(value: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal():
        raise ValueError(f"{value!r} is not a whole number")
    return int(text)


def _port(value: object) -> int:
    port = _count(value)
    if port > 65535:
        raise ValueError(f"{value!r} is not a port (0 to 65535)")
    return port


def _one_of(*choices: str) -> Parser:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)

    return read


def parse_expert_cache(value: object) -> int | str:
    """ "auto", "all" or bytes. Raises ValueError."""
    if value in ("auto", "all"):
        return str(value)
    try:
        size_bytes = parse_size(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither auto nor all nor a size such as 512MiB") from None
    if size_bytes == 0:
        raise ValueError("an expert cache needs room for experts")
    return size_bytes


def _setting(default: object, read: Parser, help: str, *, secret: bool = False) -> Any:
    metadata = {"read": read, "help": help, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------- the settings


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "edge-runtime"


@dataclass(frozen=True, slots=True)
class GeneralConfig:
    state_directory: Path = _setting(  # noqa: RUF009 (makes a field)
        _state_directory, _path, "keys, journal and fetched bundles of this machine"
    )
    log_level: str = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "least severe message to log"
    )


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Where `Client`, `generate`, `chat`, `embed` and `devices` find the coordinator."""

    url: str = _setting("http://127.0.0.1:8080", _text, "address of the coordinator's HTTP API")
    api_key: str = _setting("", _text, "API key sent with every request", secret=True)
    timeout_seconds: float = _setting(
        600.0, parse_duration, "longest silence in one answer before the client gives up"
    )


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What a device offers."""

    name: str = _setting("", _text, "name of this device ('' for the host name)")
    join: str = _setting("", _text, "join link of the coordinator; needed once", secret=True)
    memory_bytes: int = _setting(0, parse_size, "memory of the whole process (0: half of what is free)")
    threads: int = _setting(0, _count, "compute threads (0: one per core)")
    expert_cache: int | str = _setting(
        "auto",
        parse_expert_cache,
        "memory for experts on flash: a size, all (none stays there) or auto (what is left)",
    )
    expert_start_bits: int = _setting(
        ALL_BITS,
        parse_start_bits,
        "use bit-nested experts from so many bits on, complete them later: 2, 4 (lossy); or all: the same tokens",
    )
    expert_prediction: str = _setting(
        AUTO,
        _one_of(*SETTINGS),
        "keep or read the next layer's experts on a guess, where tokens are faster for it here (auto), or never (off)",
    )
    executor: str = _setting(
        "auto",
        _one_of("auto", "native", "onnx", "torch"),
        "who computes: native kernels, ONNX Runtime, or torch (auto: torch on a CUDA device)",
    )


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    host: str = _setting("127.0.0.1", _text, "address the HTTP API binds to")
    port: int = _setting(8080, _port, "port of the HTTP API (0: any)")
    kv_tokens: int = _setting(4096, _count, "KV room each stage must have, in tokens")
    keep_requests_seconds: float = _setting(
        7 * 86400.0, parse_duration, "how long finished requests stay in the journal, e.g. 168h"
    )
    keep_requests: int = _setting(100_000, _count, "how many finished requests stay in the journal")


_SECTIONS: Mapping[str, type[Any]] = {
    "general": GeneralConfig,
    "client": ClientConfig,
    "agent": AgentConfig,
    "coordinator": CoordinatorConfig,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One value and its story, as `config show` prints it."""

    name: str  # "client.url"
    value: object
    source: str  # "default", the file's path, the environment variable, "--flag"
    help: str
    secret: bool


@dataclass(frozen=True, slots=True)
class Config:
    general: GeneralConfig
    client: ClientConfig
    agent: AgentConfig
    coordinator: CoordinatorConfig
    sources: Mapping[str, str]  # "client.url" -> where from

    def settings(self) -> Iterator[Setting]:
        for section in _SECTIONS:
            values = getattr(self, section)
            for item in dataclasses.fields(values):
                name = f"{section}.{item.name}"
                yield Setting(
                    name,
                    getattr(values, item.name),
                    self.sources[name],
                    item.metadata["help"],
                    item.metadata["secret"],
                )


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Read all layers. `flags` maps names ("client.url") to values; None is a flag that was not given."""
    environ = os.environ if environ is None else environ
    given: dict[str, tuple[object, str]] = {}
    given.update(_from_file(_config_file(environ) if file is None else file))
    given.update(_from_environment(environ))
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = (value, "--" + name.partition(".")[2].replace("_", "-"))
    known = _known()
    for name, (_, source) in given.items():
        if name not in known:
            raise ConfigError(f"{source}: there is no setting {name!r}", hint=_hint_near(name))
    sources: dict[str, str] = {}
    sections = {name: _build(name, section, given, sources) for name, section in _SECTIONS.items()}
    return Config(**sections, sources=sources)


_Section = TypeVar("_Section")


def _build(
    section: str,
    kind: type[_Section],
    given: Mapping[str, tuple[object, str]],
    sources: dict[str, str],
) -> _Section:
    values: dict[str, object] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = f"{section}.{item.name}"
        sources[name] = "default"
        if name in given:
            value, sources[name] = given[name]
            try:
                values[item.name] = item.metadata["read"](value)
            except ValueError as problem:
                raise ConfigError(
                    f"{sources[name]}: {name}: {problem}",
                    hint="`edge-runtime config show` lists every setting and where it comes from",
                ) from None
    return kind(**values)


def _known() -> dict[str, dataclasses.Field[Any]]:
    return {
        f"{section}.{item.name}": item
        for section, kind in _SECTIONS.items()
        for item in dataclasses.fields(kind)
    }


def _hint_near(name: str) -> str:
    near = difflib.get_close_matches(name, list(_known()), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "`edge-runtime config show` lists every setting"


def _config_file(environ: Mapping[str, str]) -> Path | None:
    named = environ.get(CONFIG_FILE_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{CONFIG_FILE_VARIABLE}: there is no file {path}", hint=f"unset {CONFIG_FILE_VARIABLE}"
            )
        return path
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    path = Path(base).expanduser() / "edge-runtime" / "config.toml"
    return path if path.is_file() else None


def _from_file(path: Path | None) -> Iterator[tuple[str, tuple[object, str]]]:
    if path is None:
        return
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"{path}: {problem}", hint="the file must be readable TOML") from None
    for section, values in document.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: {section!r} stands outside a section",
                hint=f"sections are {', '.join(f'[{name}]' for name in _SECTIONS)}",
            )
        for name, value in values.items():
            yield f"{section}.{name}", (value, str(path))


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[object, str]]]:
    variables = {PREFIX + name.replace(".", "_").upper(): name for name in _known()}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == CONFIG_FILE_VARIABLE:
            continue
        if variable not in variables:
            near = difflib.get_close_matches(variable, list(variables), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"unset {variable}"
            raise ConfigError(f"{variable} is not a setting of ours", hint=hint)
        yield variables[variable], (environ[variable], variable)


# ---------------------------------------------------------------- what else the environment says


def colour_wanted() -> bool:
    """Not when NO_COLOR is set to anything, nor on a terminal that says it is dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process we start: ours, with `changes`."""
    return {**os.environ, **changes}
