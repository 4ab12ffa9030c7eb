"""Training on the user's model and data: tasks, models, the loop, evaluation, fine-tuning, constraints.

Only the tables of what there is; torch is imported by the leaf modules when one of them is used.
"""

from __future__ import annotations

from typing import Any

from steelyard.core.registry import Registry, Row

MODELS: Registry[Any] = Registry(
    "model",
    "models",
    {
        "linear": Row("steelyard.learn.models:linear", "one linear layer: multinomial logistic regression", "learn"),
        "mlp": Row("steelyard.learn.models:mlp", "fully connected layers of any widths", "learn"),
        "lenet-300-100": Row("steelyard.learn.models:lenet_300_100", "two hidden layers, 300 and 100 units", "learn"),
        "lenet-5": Row(
            "steelyard.learn.models:lenet_5", "two convolutions and two linear layers, Caffe's form", "learn"
        ),
        "cnn": Row("steelyard.learn.models:cnn", "3x3 convolutions, pooling and one hidden layer", "learn"),
        "rnn": Row("steelyard.learn.recurrent:rnn", "a recurrent network: plain, LSTM or GRU cells", "learn"),
        "transformer": Row(
            "steelyard.learn.sequence:transformer", "pre-norm attention blocks; causal on text", "learn"
        ),
    },
)

TASKS: Registry[Any] = Registry(
    "task",
    "tasks",
    {
        "digits": Row("steelyard.learn.tasks.bundled:digits", "1,797 handwritten digits of 8x8 pixels", "learn"),
        "breast-cancer": Row("steelyard.learn.tasks.bundled:breast_cancer", "569 tumours, 30 measurements", "learn"),
        "mnist": Row("steelyard.learn.tasks.mnist:mnist", "handwritten digits of 28x28 pixels", "learn"),
        "fashion-mnist": Row("steelyard.learn.tasks.mnist:fashion_mnist", "clothing, 28x28 pixels", "learn"),
        "text": Row("steelyard.learn.tasks.text:text", "the next character of a text: text, text:FILE", "learn"),
        "adding": Row("steelyard.learn.tasks.memory:adding", "the sum of two marked numbers: adding:LENGTH", "learn"),
        "copying": Row("steelyard.learn.tasks.memory:copying", "ten symbols after a wait: copying:LENGTH", "learn"),
        "csv": Row("steelyard.learn.tasks.csv:csv", "a column of a table from the others: csv:FILE:TARGET", "learn"),
    },
)
