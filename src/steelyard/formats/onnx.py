"""ONNX: the tensors of a graph, read from the protocol buffer itself; values are stepped over until they are asked for.

Decides that every tensor in the file is one of the weights: initialisers, constants and other tensor attributes of
nodes, sparse initialisers as two parts each, those of subgraphs, functions and training graphs. A constant has the
name of its output. A name that is there more than once gets the path of its subgraph before it, except in the main
graph. Quantised tensors are what they are: no QuantizeLinear is applied. Text tensors are named in the metadata and
left out. Knows nothing of what the nodes compute.

Specification: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from steelyard.core.spec import Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import FormatError, SteelyardError, quoted
from steelyard.formats._protobuf import LENGTH, VARINT, Field, Wire
from steelyard.formats._tensorproto import RANK_LIMIT, Tensor, Tensors, pair
from steelyard.formats.base import Format
from steelyard.formats.source import Source

DEPTH = 32  # of graphs in graphs
COST = 10  # fields that take as long as what a tensor costs beside its fields
SKIPPED = 100  # text tensors that the metadata name
MODEL = {  # the fields of ModelProto: their names and wire types
    1: ("ir_version", VARINT),
    2: ("producer_name", LENGTH),
    3: ("producer_version", LENGTH),
    4: ("domain", LENGTH),
    5: ("model_version", VARINT),
    6: ("doc_string", LENGTH),
    7: ("graph", LENGTH),
    8: ("opset_import", LENGTH),
    14: ("metadata_props", LENGTH),
    20: ("training_info", LENGTH),
    25: ("functions", LENGTH),
    26: ("configuration", LENGTH),
}


@dataclass(frozen=True)
class Onnx(Format):
    """A ModelProto; external data are read from files in its folder."""

    name: ClassVar[str] = "onnx"
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    entries: ClassVar[tuple[str, ...]] = ("model.onnx", "*.onnx")

    def claims(self, head: bytes, source: Source, /) -> bool:
        """A version first, then fields of a model only, one graph among them, up to the end of the file."""
        if len(head) < 2 or head[0] != 8 or not 0 < head[1] < 128:
            return False
        graphs = 0
        try:
            with source.reading() as file:
                for found in Wire(source, file, limit=10_000).fields(0, source.size, ""):
                    if MODEL.get(found.number, ("", -1))[1] != found.wire:
                        return False
                    graphs += found.number == 7
        except FormatError:
            return False
        return graphs == 1

    def open(self, source: Source, /) -> Weights:
        """The tensors of a model; reads everything but their values."""
        with source.reading() as file:
            found = _Model(source, Wire(source, file))
            found.read()
        return found.weights()


@dataclass(frozen=True)
class _Named:
    """A tensor, its name in its graph, and the path of that graph ('' = the main graph)."""

    scope: str
    name: str
    tensor: Tensor


class _Model:
    """What is found on the way through one file."""

    def __init__(self, source: Source, wire: Wire):
        self._source, self._wire = source, wire
        self._parser = Tensors(source, wire)
        self._tensors: list[_Named] = []
        self._skipped: list[str] = []
        self._meta: dict[str, str] = {}

    def read(self) -> None:
        """Walk over the model; raises FormatError naming the file, the path of the field, and the byte."""
        wire, graph = self._wire, False
        opsets: list[str] = []
        counts: Counter[int] = Counter()
        for found in wire.fields(0, self._source.size, "model"):
            if found.number not in MODEL:
                continue
            at, kind = MODEL[found.number]
            wire.expect(found, kind, at)
            if found.number == 7:
                if graph:
                    raise wire.wrong(at, "a model has one graph, this one has more", found.begin)
                graph = True
                self._graph(found, at, "", 0)
            elif found.number == 8:
                opsets.append(self._opset(found, at))
            elif found.number == 14:
                key, value = pair(wire, found, at)
                self._meta[f"metadata_props.{key}"] = value
            elif found.number in (20, 25):
                at = f"{at}[{counts[found.number]}]"
                counts[found.number] += 1
                (self._training if found.number == 20 else self._function)(found, at)
            elif kind == VARINT:
                self._meta[at] = str(wire.signed(found, at))
            elif found.number != 26:
                self._meta[at] = wire.text(found, at)
        if not graph:
            raise wire.wrong("model", "expected a graph, found none; this is no ONNX model", 0)
        if opsets:
            self._meta["opset_import"] = ", ".join(opsets)

    def weights(self) -> Weights:
        """The tensors under names that differ; those that share bytes of an external file are tied."""
        items: dict[str, Weight] = {}
        ties: dict[str, str] = {}
        first: dict[tuple[str, int, Spec], str] = {}
        for name, tensor in self._renamed():
            place = (str(tensor.source.path), tensor.begin, tensor.spec)
            if tensor.source is not self._source and tensor.stored and place in first:
                ties[name] = first[place]
            else:
                first[place] = name
                items[name] = tensor.weight(name)
        if self._skipped:
            more = len(self._skipped) - SKIPPED
            said = ", ".join(self._skipped[:SKIPPED]) + (f", and {more} more" if more > 0 else "")
            self._meta["skipped"] = f"{said}: text is no weight"
        try:
            return Weights(items.values(), ties, self._meta)
        except SteelyardError as error:
            raise FormatError(str(error), path=self._source.path) from error

    def _renamed(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its name in the collection."""
        often = Counter(item.name for item in self._tensors)
        main = Counter(item.name for item in self._tensors if not item.scope)
        taken: dict[str, int] = {}  # how many tensors asked for a name
        for item in self._tensors:
            if not item.scope:
                if main[item.name] > 1:
                    text = f"tensor {quoted(item.name)} is there twice in one graph; export the model again"
                    raise self._wire.wrong("graph", text, item.tensor.begin)
                yield item.name, item.tensor
                continue
            plain = name = item.name if often[item.name] == 1 else f"{item.scope}/{item.name}"
            while name in taken or name in main:
                taken[plain] = taken.get(plain, 1) + 1
                name = f"{plain}~{taken[plain]}"
            taken[name] = 1
            yield name, item.tensor

    def _graph(self, found: Field, at: str, scope: str, depth: int) -> None:
        if depth > DEPTH:
            raise self._wire.wrong(at[:200], f"graphs lie more than {DEPTH} deep in each other", found.begin)
        self._wire.expect(found, LENGTH, at)
        nodes = dense = sparse = 0
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 1:
                self._node(below, f"{at}.node[{nodes}]", nodes, scope, depth)
                nodes += 1
            elif below.number == 5:
                self._tensor(below, f"{at}.initializer[{dense}]", scope, None)
                dense += 1
            elif below.number == 15:
                self._sparse(below, f"{at}.sparse_initializer[{sparse}]", scope, None)
                sparse += 1
            elif below.number == 2 and not depth and not scope:
                self._meta["graph.name"] = self._wire.text(below, f"{at}.name")

    def _node(self, found: Field, at: str, index: int, scope: str, depth: int) -> None:
        wire = self._wire
        wire.expect(found, LENGTH, at)
        attributes: list[Field] = []
        output = name = kind = None
        for below in wire.fields(found.begin, found.end, at):
            if below.number == 5:
                wire.charge(1, at, below.begin)
                attributes.append(below)
            elif below.number == 2 and output is None:
                output = below
            elif below.number == 3:
                name = below
            elif below.number == 4:
                kind = below
        for number, below in enumerate(attributes):
            where = f"{at}.attribute[{number}]"
            payload = self._payload(below, where)
            if not payload:
                continue
            label = wire.text(output, f"{at}.output[0]") if output else ""
            operator = wire.text(kind, f"{at}.op_type") if kind else "node"
            node = (wire.text(name, f"{at}.name") if name else "") or label or f"{operator}#{index}"
            constant = label if operator == "Constant" else ""
            self._attribute(below, payload, where, (node, constant, scope), depth)

    def _payload(self, found: Field, at: str) -> list[Field]:
        """The fields of an attribute that hold tensors and graphs."""
        self._wire.expect(found, LENGTH, at)
        holding = (5, 6, 10, 11, 22, 23)  # t, g, tensors, graphs, sparse_tensor, sparse_tensors
        return [below for below in self._wire.fields(found.begin, found.end, at) if below.number in holding]

    def _attribute(self, found: Field, payload: list[Field], at: str, node: tuple[str, str, str], depth: int) -> None:
        """The tensors of one attribute of the node with the given label, output if it is a constant, and scope."""
        label, constant, scope = node
        name = "attribute"
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 1:
                name = self._wire.text(below, f"{at}.name")
        counts: Counter[int] = Counter()
        for below in payload:
            single = below.number in (5, 6, 22)
            if single and counts[below.number]:
                raise self._wire.wrong(at, "one value is given twice", below.begin)
            number = "" if single else f"[{counts[below.number]}]"
            counts[below.number] += 1
            field_name = {5: "t", 6: "g", 10: "tensors", 11: "graphs", 22: "sparse_tensor", 23: "sparse_tensors"}
            where, own = f"{at}.{field_name[below.number]}{number}", f"{label}.{name}{number}"
            if below.number in (6, 11):
                self._graph(below, where, f"{scope}/{own}" if scope else own, depth + 1)
                continue
            known = constant if constant and single else own
            (self._tensor if below.number in (5, 10) else self._sparse)(below, where, scope, known)

    def _function(self, found: Field, at: str) -> None:
        scope, nodes, depth = at, 0, 0
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 1:
                scope = self._wire.text(below, f"{at}.name") or at
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 7:
                self._node(below, f"{at}.node[{nodes}]", nodes, scope, depth)
                nodes += 1
            elif below.number == 11:
                where = f"{at}.attribute_proto"
                self._attribute(below, self._payload(below, where), where, (scope, "", scope), depth)

    def _training(self, found: Field, at: str) -> None:
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number in (1, 2):
                part = f"{at}.{'initialization' if below.number == 1 else 'algorithm'}"
                self._graph(below, part, part, 1)

    def _sparse(self, found: Field, at: str, scope: str, name: str | None) -> None:
        """The two parts of a sparse tensor; its shape goes to the metadata."""
        self._wire.expect(found, LENGTH, at)
        values: Field | None = None
        indices: Field | None = None
        dims: list[int] = []
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 1:
                values = below
            elif below.number == 2:
                indices = below
            elif below.number == 3:
                dims += self._wire.repeated(below, f"{at}.dims")
        if values is None or indices is None:
            raise self._wire.wrong(at, "expected values and indices", found.begin)
        name = self._parser.parts(values, f"{at}.values").name if name is None else name
        self._tensor(values, f"{at}.values", scope, f"{name}.values")
        self._tensor(indices, f"{at}.indices", scope, f"{name}.indices")
        self._meta[f"sparse.{name}"] = str(dims[:RANK_LIMIT])

    def _tensor(self, found: Field, at: str, scope: str, name: str | None) -> None:
        """Add the TensorProto `found`; `name` is what it is called, None for its own name."""
        parts = self._parser.parts(found, at)
        name = parts.name if name is None else name
        self._wire.charge(COST, at, found.begin)
        tensor = self._parser.locate(found, parts, f"{at} {name[:100]!r}")
        if tensor is None:
            self._skipped.append(f"{quoted(name)} {parts.dims}")
        else:
            self._tensors.append(_Named(scope, name, tensor))

    def _opset(self, found: Field, at: str) -> str:
        domain, version = "", 0
        for below in self._wire.fields(found.begin, found.end, at):
            if below.number == 1:
                domain = self._wire.text(below, f"{at}.domain")
            elif below.number == 2:
                version = self._wire.signed(below, f"{at}.version")
        return f"{domain or 'ai.onnx'} {version}"
