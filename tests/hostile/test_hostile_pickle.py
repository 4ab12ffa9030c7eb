"""Hostile pickles: the payload kinds of the published corpora never run, and the tensors beside them come out."""

from __future__ import annotations

import ast
import codecs
import json
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import steelyard.formats
from steelyard.cli import main
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats import open
from steelyard.formats.source import InMemory
from steelyard.formats.torchzip import Torch

from pickles import (
    CONTAINERS,
    QUIET_WAYS,
    VALUES,
    WAYS,
    bare,
    beside,
    called,
    legacy,
    mutant,
    named,
    tensor,
    text,
    zipped,
)

# What the corpora call, each with the kind of its argument: a command, Python source, or a path.
CALLS: dict[str, str] = {
    **dict.fromkeys(("os.system", "posix.system", "nt.system", "os.popen", "subprocess.getoutput"), "command"),
    **dict.fromkeys(("subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_output"), "command"),
    **dict.fromkeys(("commands.getoutput", "pty.spawn", "os.execv", "os.posix_spawn", "popen2.popen2"), "command"),
    **dict.fromkeys(("builtins.eval", "builtins.exec", "__builtin__.eval", "__builtin__.exec"), "source"),
    **dict.fromkeys(("builtins.compile", "code.interact", "code.InteractiveInterpreter.runcode"), "source"),
    **dict.fromkeys(("builtins.__import__", "importlib.import_module", "runpy.run_path", "runpy.run_module"), "path"),
    **dict.fromkeys(("runpy._run_code", "timeit.timeit", "timeit.main", "cProfile.run", "profile.run", "pdb.run"), "source"),
    **dict.fromkeys(("bdb.Bdb.run", "trace.Trace.run", "doctest.debug_script", "test.support.script_helper"), "source"),
    **dict.fromkeys(("operator.attrgetter", "operator.methodcaller", "operator.itemgetter", "_operator.attrgetter"), "command"),
    **dict.fromkeys(("functools.partial", "functools.reduce", "itertools.starmap", "_functools.partial"), "command"),
    **dict.fromkeys(("builtins.getattr", "builtins.setattr", "builtins.vars", "builtins.globals", "builtins.apply"), "path"),
    **dict.fromkeys(("builtins.open", "io.open", "_io.FileIO", "shutil.rmtree", "os.remove", "os.unlink"), "path"),
    **dict.fromkeys(("pathlib.Path.write_text", "distutils.file_util.write_file", "logging.FileHandler"), "path"),
    **dict.fromkeys(("pickle.loads", "_pickle.loads", "pickle.load", "marshal.loads", "dill.loads", "cloudpickle.loads"), "path"),
    **dict.fromkeys(("joblib.load", "shelve.open", "pandas.read_pickle", "numpy.load", "torch.load"), "path"),
    **dict.fromkeys(("types.CodeType", "types.FunctionType", "ctypes.CDLL", "_ctypes.dlopen", "cffi.FFI.dlopen"), "path"),
    **dict.fromkeys(("socket.create_connection", "http.client.HTTPSConnection", "httplib.HTTPSConnection"), "path"),
    **dict.fromkeys(("requests.api.get", "urllib.request.urlopen", "aiohttp.client.ClientSession", "ftplib.FTP"), "path"),
    **dict.fromkeys(("webbrowser.open", "smtplib.SMTP", "telnetlib.Telnet", "ssl.get_server_certificate"), "path"),
    **dict.fromkeys(("pip.main", "pip._internal.main", "ensurepip._run_pip", "venv.create", "pydoc.pipepager"), "command"),
    **dict.fromkeys(("asyncio.unix_events._UnixSubprocessTransport._start", "multiprocessing.util.spawnv_passfds"), "command"),
    **dict.fromkeys(("idlelib.pyshell.ModifiedInterpreter.runcode", "idlelib.run.Executive.runcode"), "source"),
    **dict.fromkeys(("idlelib.autocomplete.AutoComplete.get_entity", "idlelib.calltip.Calltip.fetch_tip"), "source"),
    **dict.fromkeys(("lib2to3.pgen2.grammar.Grammar.loads", "lib2to3.pgen2.pgen.ParserGenerator.make_label"), "source"),
    **dict.fromkeys(("numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef"), "source"),
    **dict.fromkeys(("torch.utils._config_module.load_config", "torch.serialization.load", "torch.hub.load"), "path"),
    **dict.fromkeys(("torch._inductor.codecache.compile_file", "torch.utils.collect_env.run", "torch.jit.load"), "command"),
    **dict.fromkeys(("torch.jit.unsupported_tensor_ops.execWrapper", "torch._dynamo.guards.GuardBuilder.get"), "source"),
    **dict.fromkeys(("torch.utils.bottleneck.__main__.run_cprofile", "torch.utils.data.datapipes.utils.decoder"), "source"),
    **dict.fromkeys(("torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",), "source"),
    **dict.fromkeys(("torch.storage._load_from_bytes", "torch._utils._import_dotted_name", "torch.fx.graph._exec"), "path"),
    **dict.fromkeys(("copyreg._reconstructor", "copyreg.add_extension", "copy_reg._reconstructor"), "path"),
    **dict.fromkeys(("sys.exit", "os._exit", "os.abort", "os.kill", "signal.raise_signal", "os.putenv", "gc.collect"), "path"),
    **dict.fromkeys(("sys.modules.__setitem__", "builtins.breakpoint", "builtins.input", "linecache.updatecache"), "path"),
    **dict.fromkeys(("uuid._get_command_stdout", "platform._syscmd_ver", "imaplib.IMAP4_stream", "getpass.getpass"), "command"),
}  # fmt: skip
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pickle.",
    "marshal.loads",
    "compile",
    "exec",
    "import",
)


def argument(kind: str, canary: Path) -> bytes:
    """The argument that would make the canary."""
    return text({"command": f"touch {canary}", "source": f"open({str(canary)!r}, 'w')", "path": str(canary)}[kind])


_seen: list[str] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    writes = event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if _seen is not None and (writes or event.startswith(FORBIDDEN)) and event not in ("os.listdir", "os.scandir"):
        _seen.append(f"{event} {args!r}"[:200])


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the interpreter reports of execution, imports, processes, sockets and writing while the block runs."""
    global _seen  # noqa: PLW0603 - a hook cannot be taken away again, only made to look aside
    if not getattr(sys, "_steelyard_hook", False):
        sys.addaudithook(_hook)
        sys._steelyard_hook = True
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Everything that opening imports on purpose is imported before anybody watches."""
    for encoding in ("cp437", "latin-1", "raw-unicode-escape", "unicode-escape"):
        codecs.lookup(encoding)
    path = tmp_path_factory.mktemp("warm") / "a.pt"
    for make in CONTAINERS.values():
        path.write_bytes(make(b"\x80\x04}" + text("a") + tensor() + b"s."))
        try:
            open(path).arrays()
        except SteelyardError:
            continue


def tried(path: Path) -> tuple[dict[str, object], list[str]] | str:
    """The tensors and the globals of a file, or the message of its error; fails where anything ran."""
    with watched() as seen:
        try:
            weights = open(path)
            arrays = {name: array.tolist() for name, array in weights.arrays().items()}
            found = arrays, json.loads(weights.meta.get("pickle.globals", "[]"))
        except SteelyardError as error:
            found = str(error)
    assert seen == []
    return found


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    with watched() as seen:
        os.system("true")
        eval("1")  # noqa: S307
        (tmp_path / "x").write_bytes(b"")
    assert [line.partition(" ")[0] for line in seen] == ["os.system", "compile", "exec", "open"]


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Loaded by an unpickler, in a process of its own, each way makes its canary."""
    for index, make in enumerate(WAYS.values()):
        payload = make("posix.system", argument("command", tmp_path / f"{index}.canary"))
        (tmp_path / f"{index}.pkl").write_bytes(payload + b".")
    code = (
        "import pickle, pathlib, sys\n"
        f"for path in pathlib.Path({str(tmp_path)!r}).glob('*.pkl'):\n"
        "    try: pickle.loads(path.read_bytes())\n"
        "    except Exception: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    ran = {int(path.stem) for path in tmp_path.glob("*.canary")}
    assert [way for index, way in enumerate(WAYS) if index not in ran] == []


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("way", [*WAYS, *QUIET_WAYS])
def test_no_way_to_call_anything_calls_it(
    way: str, container: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    make = {**WAYS, **QUIET_WAYS}[way]
    for name, kind in (("posix.system", "command"), ("builtins.exec", "source")):
        payload = make(name, argument(kind, canary))
        for pickled in (
            payload + b".",
            beside(payload),
            b"\x80\x02}" + text("x") + payload + b"s" + text("a") + tensor() + b"s.",
        ):
            path.write_bytes(CONTAINERS[container](pickled))
            found = tried(path)
            assert not canary.exists()
            if isinstance(found, str):
                assert str(path) in found
                assert "\n" not in found
            elif container != "bare" and text("a") + tensor() in pickled:
                assert found[0].get("a") == VALUES.tolist() or found[0].get("x.a") == VALUES.tolist()
            status = main(["inspect", str(path)])
            shown = capsys.readouterr()
            assert status == (2 if isinstance(found, str) else 0)
            assert "Traceback" not in shown.out + shown.err
            assert not canary.exists()
            if isinstance(found, str):
                assert shown.err.count("\n") == 1
            elif way in WAYS:
                assert name in shown.out or "builtins.__import__" in shown.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_every_call_of_the_corpora_is_named_where_it_stands_and_the_tensors_come_out(
    container: str, tmp_path: Path
) -> None:
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    for name, kind in CALLS.items():
        for way in ("GLOBAL", "INST", "STACK_GLOBAL from memo", "NEWOBJ_EX", "OBJ", "NEWOBJ"):
            pickled = beside({**WAYS, **QUIET_WAYS}[way](name, argument(kind, canary)))
            path.write_bytes(CONTAINERS[container](pickled))
            found = tried(path)
            assert not isinstance(found, str), (name, way, found)
            arrays, wanted = found
            assert arrays == {"a": VALUES.tolist()}  # b is a tie
            assert [text.partition("@")[0] for text in wanted] == [name], way
            data = path.read_bytes() if container == "legacy" else pickled
            at = int(wanted[0].partition("@")[2])
            assert data[at : at + 1] in (b"c", b"i", b"\x93")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def test_a_batch_of_payloads_through_the_command_line(tmp_path: Path) -> None:
    canary, names = tmp_path / "canary", []
    for index, (name, kind) in enumerate(list(CALLS.items())[::8]):
        for container, make in CONTAINERS.items():
            path = tmp_path / f"{index}.{container}.pth"
            path.write_bytes(make(called(name, argument(kind, canary)) + (b"." if index % 2 else b"\xff")))
            names.append(str(path))
    done = subprocess.run(
        [sys.executable, "-m", "steelyard", "inspect", *names], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert not canary.exists()
    assert len(list(tmp_path.iterdir())) == len(names)


def test_a_broken_opcode_after_the_tensors_is_an_error_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    pickled = b"\x80\x02}" + text("a") + tensor() + b"s" + called("posix.system", text("id"))
    path.write_bytes(zipped(pickled + b"\xff."))
    with pytest.raises(FormatError, match=rf"archive/data.pkl, byte {len(pickled)}: pickle: expected an opcode"):
        open(path)


LAUGHS = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(100))
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "no STOP": b"\x80\x02}",
    "STOP of nothing": b".",
    "STOP of two": b"NN.",
    "STOP in a mark": b"(N.",
    "protocol 9": b"\x80\x09N.",
    "unknown opcode": b"\xff",
    "APPEND to nothing": b"a.",
    "APPEND to a number": b"K\x01K\x01a.",
    "SETITEM of a list": b"]K\x01K\x01s.",
    "a key without value": b"}(K\x01u.",
    "no mark": b"t.",
    "no mark for POP": b"0.",
    "GET of nothing": b"g5\n.",
    "BINGET of nothing": b"h\x05.",
    "PUT of nothing": b"p0\n.",
    "PUT below zero": b"Np-1\n.",
    "PUT far away": b"Np99999999999\n.",
    "INT of words": b"Ix\n.",
    "INT of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "LONG of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "FLOAT of words": b"Fx\n.",
    "a line without end": b"c" + b"x" * 3_000_000,
    "STRING without quotes": b"Sx\n.",
    "UNICODE with a broken escape": b"V\\u12\n.",
    "text that is no UTF-8": b"X\x01\x00\x00\x00\xff.",
    "LONG4 of a giant length": b"\x8b\xff\xff\xff\x7f1.",
    "LONG1 cut off": b"\x8a\xff1.",
    "BINBYTES8 of a giant length": b"\x8e" + b"\xff" * 8 + b".",
    "BINUNICODE8 of a giant length": b"\x8d" + struct.pack("<Q", 2**62) + b".",
    "BYTEARRAY8 of a giant length": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "FRAME over the end": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "FRAME in a FRAME": b"\x80\x04\x95" + struct.pack("<Q", 20) + b"\x95" + struct.pack("<Q", 2) + b"N.",
    "FRAME that cuts an opcode": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"X\x01\x00\x00\x00aN.",
    "FRAME that is open at STOP": b"\x80\x04\x95" + struct.pack("<Q", 4) + b"N.NN",
    "bytes after STOP": b"N.N.",
    "opcodes without end": b"N0" * 2_100_000 + b"N.",
    "laughs": b")q\x000" + LAUGHS + b"h\x64.",
    "laughs in lists": b"]q\x000" + LAUGHS.replace(b"\x86", b"\x86") + b"h\x64.",
    "deep lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": b")" + b"\x85" * 200_000 + b".",
    "a scalar of numpy with too many bytes": called(
        "numpy.core.multiarray.scalar", called("numpy.dtype", text("f8")), b"C\x03abc"
    ) + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pickle_is_a_typed_error_within_seconds_and_little_memory(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for make in (zipped, legacy):
        path.write_bytes(make(BROKEN[case]))
        start = time.process_time()
        with pytest.raises(FormatError) as caught:
            open(path)
        taken = time.process_time() - start
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert taken < (20 if case == "opcodes without end" else 3)  # alone it is a tenth of that


def test_what_is_large_only_by_reference_takes_little_memory(tmp_path: Path) -> None:
    """Many references to one long text as name, as key, as argument of a codec: nothing is copied without end."""
    path = tmp_path / "a.pt"
    long = text("n" * 1_000_000) + b"q\x010"
    keys = b"}" + b"h\x01" + tensor() + b"s"
    cases = {
        "names": b"\x80\x02" + long + b"}h\x01}(" + b"".join(text(str(i)) + tensor() for i in range(1000)) + b"us.",
        "keys": b"\x80\x02" + long + keys + b".",
        "codec": b"\x80\x02"
        + long
        + called("_codecs.encode", b"h\x01") * 1
        + (b"0" + called("_codecs.encode", b"h\x01")) * 5000
        + b".",
        "pairs": b"\x80\x02](" + b")" * 100_000 + b"e\x85q\x020" + (named("builtins.set") + b"h\x02R0") * 5000 + b"N.",
    }
    for name, pickled in cases.items():
        path.write_bytes(zipped(pickled))
        tracemalloc.start()
        try:
            found = tried(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert isinstance(found, str) or name == "codec", name
        assert peak < 100_000_000, name


def test_an_object_that_holds_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(b"\x80\x02}q\x00" + text("me") + b"h\x00s" + text("a") + tensor() + b"s]q\x01h\x01a\x86."))
    assert list(open(path)) == ["0.a"]


def test_names_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "a.pt"
    payload = text("evil\x1b[31m\u202e") + text("x\ny") + b"\x93)R"
    path.write_bytes(zipped(b"\x80\x04}" + text("w\x1b[2J") + tensor() + b"s" + text("k\x1b") + payload + b"s."))
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"evil\x1b[31m\u202e.x\ny" in shown


def test_the_reader_imports_no_unpickler() -> None:
    """Neither the modules by which pickles are run, nor anything that finds a module or an attribute by name."""
    folder = Path(steelyard.formats.__file__).parent
    for name in ("_pickle", "_opcodes", "_inert", "_rebuild", "_tensors", "_zip", "_oldtorch", "torchzip", "dcp"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        roots = {module.partition(".")[0] for module in modules}
        assert not roots & {"pickle", "_pickle", "pickletools", "torch", "importlib", "marshal", "copyreg", "shelve"}
        calls = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not calls & {"eval", "exec", "compile", "__import__", "getattr", "globals", "vars", "setattr"}


def test_ten_thousand_mutants_are_valid_or_refused() -> None:
    rng, valid, refused = random.Random(20261125), 0, set[str]()
    with watched() as seen:
        for _ in range(10_000):
            source = InMemory(mutant(rng), "memory.pt")
            try:
                Torch().claims(source.bytes(0, min(16, source.size)), source)
                Torch().open(source).arrays()
                valid += 1
            except SteelyardError as error:
                refused.add(str(error))
    assert seen == []
    assert 500 < valid < 9500
    assert len(refused) > 500
    assert not [text for text in refused if "\n" in text or "memory.pt" not in text]


def test_bare_pickles_are_listed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bare(called("posix.system", text("id")) + b"."))
    weights = open(path)
    assert len(weights) == 0
    assert json.loads(weights.meta["pickle.globals"]) == ["posix.system@2"]
