"""The built-in feed-forward models, and `model`, which builds any model from its name.

Decides architectures and their start (He: normal, variance 2 / fan-in, before a ReLU; biases zero).
The last layer of every built-in model is called ``head``. Knows nothing of data or training.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from steelyard.errors import ModelError, UnknownNameError
from steelyard.learn import MODELS
from steelyard.learn.calling import calling
from steelyard.learn.locate import check_options, locate
from steelyard.learn.options import check_counts, check_dropout, check_lists_of_counts
from steelyard.learn.task import Interface

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

__all__ = ["MODELS", "cnn", "lenet_5", "lenet_300_100", "linear", "mlp", "model"]


def model(name: str, interface: Interface, /, **options: Any) -> nn.Module:
    """The model of that name for that interface: a built-in one, or ``package.module:factory`` in the user's code.

    A factory is called with the interface if it takes an argument without a default, and with the options.
    Draws its start from torch's default generator. Raises UnknownNameError for a name that is not there,
    RecipeError for an option that it does not have or a value that it cannot take, ModelError for a factory that
    fails or gives no torch module.

    >>> [name for name, _ in model("mlp", Interface((4,), 2), widths=(3,)).named_parameters()]
    ['fc1.weight', 'fc1.bias', 'head.weight', 'head.bias']
    """
    if "(" in name:
        hint = "its options are arguments: model('mlp', interface, widths=(64, 32))"
        raise UnknownNameError("model", name, MODELS, hint)
    factory: Callable[..., Any] = locate(name) if ":" in name else MODELS[name]
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ModelError(f"{name} is a {type(factory).__name__}, expected a function that returns a torch.nn.Module")
    check_options(factory, options, name)
    required = [p for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with calling(name):
        built = factory(interface, **options) if positional else factory(**options)
    if not isinstance(built, nn.Module):
        raise ModelError(f"{name} returns a {type(built).__name__}, expected a torch.nn.Module")
    return built


def linear(interface: Interface) -> nn.Module:
    """W x + b on the flattened input; the weights start at He's scale divided by sqrt(2) (no ReLU follows)."""
    return _stack([("flatten", nn.Flatten()), ("head", _linear(_flat(interface), interface.outputs, gain=1.0))])


def mlp(interface: Interface, *, widths: Sequence[int] = (128, 64), dropout: float = 0.0) -> nn.Module:
    """Linear layers of the given widths with ReLU between them."""
    check_lists_of_counts(widths=widths)
    check_dropout(dropout)
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    inputs = _flat(interface)
    for i, width in enumerate(widths, 1):
        layers += [(f"fc{i}", _linear(inputs, width)), (f"relu{i}", nn.ReLU())]
        layers += [(f"dropout{i}", nn.Dropout(dropout))] if dropout else []
        inputs = width
    return _stack([*layers, ("head", _linear(inputs, interface.outputs, gain=1.0))])


def lenet_300_100(interface: Interface) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): hidden layers of 300 and 100 units, here with ReLU."""
    return mlp(interface, widths=(300, 100))


def lenet_5(interface: Interface) -> nn.Module:
    """LeNet-5 in Caffe's form (Han et al. 2015): 20 and 50 5x5 filters with 2x2 pooling, 500 hidden units.

    431,080 parameters on 1x28x28. Images smaller than 16 pixels are padded so that both convolutions fit.
    """
    channels, height, width = _image(interface, "lenet-5")
    pad = max(0, 16 - min(height, width) + 1) // 2
    rows, columns = (((n + 2 * pad - 4) // 2 - 4) // 2 for n in (height, width))
    return _stack(
        [
            ("conv1", _conv(channels, 20, 5, pad)),
            ("relu1", nn.ReLU()),
            ("pool1", nn.MaxPool2d(2)),
            ("conv2", _conv(20, 50, 5, 0)),
            ("relu2", nn.ReLU()),
            ("pool2", nn.MaxPool2d(2)),
            ("flatten", nn.Flatten()),
            ("fc1", _linear(50 * rows * columns, 500)),
            ("relu3", nn.ReLU()),
            ("head", _linear(500, interface.outputs, gain=1.0)),
        ]
    )


def cnn(
    interface: Interface, *, channels: Sequence[int] = (32, 64), hidden: int = 128, dropout: float = 0.25
) -> nn.Module:
    """3x3 convolutions with ReLU, 2x2 max-pooling after each but the first, one hidden layer.

    A pooling that would leave less than one pixel is left out.
    """
    check_lists_of_counts(channels=channels)
    check_counts(hidden=hidden)
    check_dropout(dropout)
    planes, height, width = _image(interface, "cnn")
    layers: list[tuple[str, nn.Module]] = []
    for i, count in enumerate(channels, 1):
        layers += [(f"conv{i}", _conv(planes, count, 3, 1)), (f"relu{i}", nn.ReLU())]
        planes = count
        if (i > 1 or height > 16) and min(height, width) >= 2:
            layers.append((f"pool{i}", nn.MaxPool2d(2)))
            height, width = height // 2, width // 2
    layers += [("flatten", nn.Flatten())]
    layers += [("dropout", nn.Dropout(dropout))] if dropout else []
    layers += [("fc1", _linear(planes * height * width, hidden)), ("relu_fc1", nn.ReLU())]
    return _stack([*layers, ("head", _linear(hidden, interface.outputs, gain=1.0))])


def _stack(layers: Sequence[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    return _start(layer, inputs, gain)


def _conv(inputs: int, outputs: int, size: int, padding: int) -> nn.Conv2d:
    return _start(nn.Conv2d(inputs, outputs, size, padding=padding), inputs * size * size, math.sqrt(2))


def _start(layer: Layer, fan_in: int, gain: float) -> Layer:
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    nn.init.zeros_(layer.bias)
    return layer


def _flat(interface: Interface) -> int:
    if interface.vocabulary:
        raise ModelError("this model takes numbers and the task gives tokens: use rnn or transformer")
    return math.prod(interface.shape)


def _image(interface: Interface, name: str) -> tuple[int, int, int]:
    if interface.vocabulary or len(interface.shape) != 3 or min(interface.shape[1:]) < 4:
        raise ModelError(
            f"{name} needs images of shape (channels, height, width), 4 pixels or more, "
            f"the task gives {interface.shape}: use mlp, or another task"
        )
    channels, height, width = interface.shape
    return channels, height, width
