"""Every error of ours, in one tree.

EdgeRuntimeError
├── UsageError            the caller asked for something that can't be (bad flag, bad value, unknown name)
├── ConfigError           a setting is wrong: file, environment or flag
├── BundleError           a bundle can't be read, checked or signed
│   └── TamperedError     bytes differ from what the signed manifest says; names the slice
├── ExportError           a checkpoint can't be turned into a bundle
├── ProtocolError         a peer sent something the protocol does not allow
│   └── VersionError      the peer speaks another protocol version
├── TransportError        a link could not be made or broke
│   └── ConnectionClosed  the other side went away
├── TrustError            a device, key, token or signature is not trusted
├── CapacityError         does not fit (memory, context), now or ever
├── PlanError             no plan satisfies the constraints
├── EngineError           a stage could not be loaded or run
└── RequestFailed         an accepted request could not be finished

Each carries a stable code, and a hint: the next step for the person who reads it.
"""

from __future__ import annotations


class EdgeRuntimeError(Exception):
    """Base of all our errors: one sentence, a stable `code`, and a `hint`."""

    code = "internal_error"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code:
            self.code = code


class UsageError(EdgeRuntimeError):
    code = "usage"


class ConfigError(EdgeRuntimeError):
    code = "config"


class BundleError(EdgeRuntimeError):
    code = "bundle"


class TamperedError(BundleError):
    code = "tampered"


class ExportError(EdgeRuntimeError):
    code = "export"


class ProtocolError(EdgeRuntimeError):
    code = "protocol"


class VersionError(ProtocolError):
    code = "protocol_version"


class TransportError(EdgeRuntimeError):
    code = "transport"


class ConnectionClosed(TransportError):
    code = "connection_closed"


class TrustError(EdgeRuntimeError):
    code = "not_trusted"


class CapacityError(EdgeRuntimeError):
    code = "capacity"


class PlanError(EdgeRuntimeError):
    code = "plan"


class EngineError(EdgeRuntimeError):
    code = "engine"


class RequestFailed(EdgeRuntimeError):
    code = "request_failed"


def first_of(problems: BaseExceptionGroup[EdgeRuntimeError]) -> EdgeRuntimeError:
    """Of what `except*` caught, however deep it lies: the failure that ended the others."""
    problem: BaseException = problems
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    assert isinstance(problem, EdgeRuntimeError)
    return problem
