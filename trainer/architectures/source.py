"""The layers of a network as Python code, as the training notes keep them."""

import inspect
from typing import Any

# Given by the position in the network, or the same for every layer.
_NOT_SHOWN = {"name", "trainable", "dtype", "data_format", "axis"}


def format_layers(model: Any) -> str:
    """Return one statement per layer, with the arguments that differ from the defaults of Keras.

    Args:
        model: a built `tf_keras.Model`. A chain of layers becomes a `Sequential`; any other network becomes calls of
            named layers.
    """
    size = ", ".join(map(str, model.input_shape[1:]))
    shown = [layer for layer in model.layers if type(layer).__name__ != "InputLayer"]
    if type(model).__name__ == "Sequential":
        calls = [f"    layers.{_format_call(layer)}," for layer in shown]
        return "\n".join(["model = Sequential([", f"    Input(({size})),", *calls, "])"])
    lines = [f"{model.inputs[0].node.layer.name} = Input(({size}))"]
    for layer in shown:
        inputs = [tensor.node.layer.name for node in layer.inbound_nodes for tensor in _as_list(node.keras_inputs)]
        operand = inputs[0] if len(inputs) == 1 else f"[{', '.join(inputs)}]"
        lines.append(f"{layer.name} = layers.{_format_call(layer)}({operand})")
    return "\n".join(lines)


def _format_call(layer: Any) -> str:
    parameters = inspect.signature(type(layer).__init__).parameters
    config = layer.get_config()
    arguments = []
    for name, parameter in parameters.items():
        if name in _NOT_SHOWN or name not in config:
            continue
        value = _plain(config[name])
        if value == _plain(parameter.default):
            continue
        positional = parameter.default is inspect.Parameter.empty
        arguments.append(repr(value) if positional else f"{name}={value!r}")
    return f"{type(layer).__name__}({', '.join(arguments)})"


def _plain(value: Any) -> Any:
    """Return a config value as one would write it: (3, 3) as 3, and a serialized object as its name."""
    if value == "linear":
        return None
    if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):
        return value[0]
    if isinstance(value, dict) and "class_name" in value:
        name: str = value["class_name"]
        return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
    return value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
