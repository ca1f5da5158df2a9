"""Chat messages as the official clients send them, checked one by one.

Only text reaches a template: pictures, sound and tool calls are refused by name. Knows: roles and content parts. Does
not know: templates, tokens.
"""

from __future__ import annotations

from coordinator.api.errors import ApiError

MAX_MESSAGES = 4096
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_EMPTY_IN_ANSWERS = frozenset({"refusal", "tool_calls", "function_call", "audio", "annotations"})


def read_messages(value: object) -> list[dict[str, object]]:
    """Messages with a role and a text each (`developer` is the newer name of `system`)."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise _wrong("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return [_read_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _read_message(value: object, param: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(param, "must be an object with `role` and `content`")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{param}.role", f"must be one of {', '.join(_ROLES)}")
    message: dict[str, object] = {"role": _ROLES[role], "content": _read_content(value.get("content"), param)}
    for name, each in value.items():
        if name in ("role", "content") or (name in _EMPTY_IN_ANSWERS and not each):
            continue
        if name != "name":
            raise ApiError(
                f"`{param}.{name[:64]}` is not supported.",
                code="unsupported_parameter",
                param=f"{param}.{name[:64]}",
            )
        if each is not None:
            if not isinstance(each, str):
                raise _wrong(f"{param}.name", "must be a string")
            message["name"] = each
    return message


def _read_content(value: object, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _wrong(f"{param}.content", "must be a string or a list of text parts")
    return "".join(_read_part(each, f"{param}.content[{index}]") for index, each in enumerate(value))


def _read_part(value: object, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind != "text":
        raise _wrong(param, "must be a part of type `text`: nothing else is supported")
    text = value.get("text")
    if not isinstance(text, str) or value.keys() - {"type", "text"}:
        raise _wrong(param, "must have a string `text` and nothing more")
    return text


def _wrong(param: str, complaint: str) -> ApiError:
    return ApiError(f"`{param}` {complaint}.", code="invalid_value", param=param)
