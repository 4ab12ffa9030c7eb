"""Is `diff` right, and what does it cost: a truth set of planted differences, and a pair of 337 MB, beside weightscope.

Processor time is user + system of the whole process, medians of runs that alternate between the two; memory is the
largest resident set, ours also above that of a process which only imports. The peer needs an environment of its own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 weightscope==0.4.3
    python bench/diff/run.py --peer peer/bin/python [--repeats 5]

Of each case of the truth set two things are asked: is a difference seen on exactly the tensors that have one, and is
it called what it is. What weightscope cannot express (casts, permutations, scalings, ...) it may still see.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PEER_ON_TRUTH = """
import json, math, sys
from pathlib import Path
from weightscope.diff import diff_models
out = {}
for case in sorted(Path(sys.argv[1]).iterdir()):
    try:
        d = diff_models(str(case / "a"), str(case / "b"))
        changed = [t.name for t in d.tensors if t.n_changed]
        nan = [t.name for t in d.tensors if not t.n_changed and math.isnan(t.max_delta)]
        out[case.name] = {"changed": changed, "nan": nan, "renames": d.renames}
        out[case.name] |= {"removed": d.only_in_a, "added": d.only_in_b}
    except Exception as error:
        out[case.name] = {"error": f"{type(error).__name__}: {error}"[:200]}
print(json.dumps(out))
"""
EXPRESSED = {"values": "changed", "added": "added", "removed": "removed", "renamed": "renames"}  # by the peer


def cost(command: list[str]) -> tuple[float, float]:
    """Processor seconds and megabytes of the largest resident set."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def write_pair(folder: Path) -> None:
    """A language model in bfloat16, and the same after a small change everywhere."""
    import ml_dtypes
    import numpy as np

    import steelyard as sy

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)

    hidden, inner, vocabulary = 1024, 2816, 13278
    first = {"model.embed_tokens.weight": normal(vocabulary, hidden)}
    for i in range(11):
        layer = f"model.layers.{i}."
        first |= {f"{layer}self_attn.{k}_proj.weight": normal(hidden, hidden) for k in "qkvo"}
        first |= {f"{layer}mlp.{k}_proj.weight": normal(inner, hidden) for k in ("gate", "up")}
        first[f"{layer}mlp.down_proj.weight"] = normal(hidden, inner)
        first[f"{layer}input_layernorm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
    first["lm_head.weight"] = normal(vocabulary, hidden)

    def tuned(x: np.ndarray) -> np.ndarray:
        step = rng.standard_normal(x.shape, np.float32) * np.float32(2e-4)
        return (x.astype(np.float32) + step).astype(ml_dtypes.bfloat16)

    for side, weights in (("a", first), ("b", {k: tuned(x) for k, x in first.items()})):
        (folder / side).mkdir(parents=True)
        sy.write(sy.Weights.of(weights), folder / side / "model.safetensors")


def costs(folder: Path, peer: Path, repeats: int) -> dict[str, float]:
    """Medians for both, on the pair in `folder`."""
    a, b = folder / "a", folder / "b"
    ours = [sys.executable, "-m", "steelyard", "diff", str(a / "model.safetensors"), str(b / "model.safetensors")]
    theirs = [str(peer.parent / "weightscope"), "diff", str(a), str(b)]
    bare = [
        sys.executable,
        "-c",
        "import steelyard.explain.diff.verdict, steelyard.kernels.compare, steelyard.cli.entry",
    ]
    commands = {"ours": ours, "weightscope": theirs, "import": bare}
    for command in commands.values():
        cost(command)  # warms the file cache, and compiles what is kept
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(cost(command))
    seconds = {name: statistics.median(s for s, _ in r) for name, r in runs.items()}
    memory = {name: statistics.median(m for _, m in r) for name, r in runs.items()}
    return {
        "ours, processor s": seconds["ours"],
        "weightscope, processor s": seconds["weightscope"],
        "ours / weightscope": statistics.median(
            o / w for (o, _), (w, _) in zip(runs["ours"], runs["weightscope"], strict=True)
        ),
        "ours, MB": memory["ours"],
        "ours above import, MB": memory["ours"] - memory["import"],
        "weightscope, MB": memory["weightscope"],
    }


def truth(folder: Path, peer: Path) -> dict[str, object]:
    """How many planted differences each sees, and how many it calls what they are."""
    sys.path.insert(0, str(ROOT / "tests"))
    import steelyard as sy
    from explain.truth import cases
    from steelyard.explain.diff import difference

    listed = cases()
    ours: dict[str, tuple[bool, bool]] = {}
    for i, case in enumerate(listed):
        paths = [folder / f"{i:02d}" / side / "model.safetensors" for side in "ab"]
        for path, weights in zip(paths, (case.a, case.b), strict=True):
            path.parent.mkdir(parents=True)
            sy.write(weights, path)
        found = difference(*map(sy.open, paths))
        said = {f.name: (f.verdict, "; ".join(f.notes)) for f in found.findings if not f.same}
        seen = said.keys() == case.truth.keys()
        right = seen and all(said[n][0] == v and note in said[n][1] for n, (v, note) in case.truth.items())
        ours[case.name] = (seen, right and found.tables()[-1].rows[0]["verdict"] == case.verdict)
    done = subprocess.run([str(peer), "-c", PEER_ON_TRUTH, str(folder)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    theirs = {case.name: either(case, said[f"{i:02d}"]) for i, case in enumerate(listed)}
    return {
        "cases": len(listed),
        "ours: seen": sum(seen for seen, _ in ours.values()),
        "ours: called what it is": sum(right for _, right in ours.values()),
        "weightscope: seen": sum(seen for seen, _ in theirs.values()),
        "weightscope: called what it is": sum(right for _, right in theirs.values()),
        "weightscope, case by case": {name: list(x) for name, x in theirs.items()},
        "ours, missed": [name for name, (_, right) in ours.items() if not right],
    }


def either(case: object, said: dict) -> tuple[bool, bool]:
    """The better of two readings: that a largest change of NaN means a change, and that it does not."""
    as_change = {**said, "changed": [*said.get("changed", []), *said.get("nan", [])]}
    return max(judged(case, said), judged(case, as_change))


def judged(case: object, said: dict) -> tuple[bool, bool]:
    """Whether the peer sees a difference on exactly the right tensors, and calls it what it is, leniently."""
    if "error" in said:
        return False, False
    names = {b: a for a, b in said["renames"]}
    was = case.was or {}
    told = {"changed": set(said["changed"]), "added": set(said["added"]), "removed": set(said["removed"])}
    told["renames"] = {b for b in names if names[b] not in told["changed"]}
    seen = set().union(*told.values()) == {was.get(n, n) if v != "renamed" else n for n, (v, _) in case.truth.items()}
    expected = {(EXPRESSED.get(v), was.get(n, n) if v == "values" else n) for n, (v, _) in case.truth.items()}
    right = seen and expected == {(kind, n) for kind, all_names in told.items() for n in all_names}
    plain = case.verdict in ("different", "identical", "identical under other names", "identical, laid out otherwise")
    return seen, right and plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=Path, help="the python that has weightscope")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, help="only write the pair into this folder")
    given = parser.parse_args()
    if given.write is not None:
        write_pair(given.write)
        return
    if given.peer is None:
        parser.error("--peer is missing: the python of an environment with weightscope")
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own: what a child is said to use begins with the memory of its parent
        subprocess.run([sys.executable, __file__, "--write", str(Path(folder) / "pair")], check=True)
        size = (Path(folder) / "pair" / "a" / "model.safetensors").stat().st_size
        figures: dict[str, object] = {"one file, MB": size / 1e6}
        figures |= costs(Path(folder) / "pair", given.peer, given.repeats)
        figures |= truth(Path(folder) / "truth", given.peer)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4g}" if isinstance(figure, float) else f"{name}: {figure}")
    (HERE / "results").mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "repeats": given.repeats,
        "figures": figures,
    }
    (HERE / "results" / f"{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
