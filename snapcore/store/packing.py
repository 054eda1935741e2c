"""Nested state as plain JSON and named tensors: optimizers, scalers and loaders are saved without pickle."""

from collections.abc import Callable, Mapping
from typing import Any

from snapcore.errors import DataError

_SCALARS = (str, bool, int, float, type(None))


def pack(value: Any, name: str, is_tensor: Callable[[Any], bool]) -> tuple[Any, dict[str, Any]]:
    """Return `value` as plain JSON, and the tensors in it by name.

    Dictionaries (whose keys are text or integers), lists, tuples, bytes and scalars are restored by `unpack`, NaN and
    infinities too.

    Arguments:
        value: such as an optimizer's `state_dict()`.
        name: the prefix of the tensors' names.
        is_tensor: returns whether a value is a tensor.

    Raises:
        DataError: it holds anything else; the message says where.

    Example:
        >>> pack({"a": (1, 2.5), 3: None}, "state", lambda value: False)
        ({'dict': [['a', {'tuple': [1, 2.5]}], [3, None]]}, {})
    """
    tensors: dict[str, Any] = {}
    return _pack(value, name, is_tensor, tensors), tensors


def _pack(value: Any, name: str, is_tensor: Callable[[Any], bool], tensors: dict[str, Any]) -> Any:
    if is_tensor(value):
        while name in tensors:  # {"a/b": …} and {"a": {"b": …}} give the same name
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _pack(item, f"{name}/{key}", is_tensor, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}/{position}", is_tensor, tensors) for position, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value) is float and value - value != 0:
        return {"float": repr(value)}
    if type(value) in _SCALARS:
        return value
    raise DataError(
        f"{name} is a {type(value).__name__}, which cannot be saved without pickle: use numbers, text, bytes, lists, "
        "tuples, dictionaries or tensors"
    )


def unpack(packed: Any, tensors: Mapping[str, Any]) -> Any:
    """Return what was given to `pack`, with `tensors` in place of those that had their names."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    if kind == "list":
        return [unpack(item, tensors) for item in content]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    return bytes.fromhex(content) if kind == "bytes" else float(content)
