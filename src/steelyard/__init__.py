"""Steelyard: weigh, train, explain, shrink, move and ship the weights of neural networks.

>>> import steelyard as sy

Names are imported when they are first used; importing the package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    # the nouns
    "DType": "core.spec:DType",
    "Spec": "core.spec:Spec",
    "dtype": "core.spec:dtype",
    "Weight": "core.weights:Weight",
    "Weights": "core.weights:Weights",
    "Codec": "core.packed:Codec",
    "Packed": "core.packed:Packed",
    "nest": "core.packed:nest",
    "smallest": "core.packed:smallest",
    "pack": "core.packed:pack",
    "Table": "core.table:Table",
    "where": "core.where:where",
    "chain": "core.transform:chain",
    "on": "core.transform:on",
    "each": "core.transform:each",
    "SteelyardError": "errors:SteelyardError",
    # files and modules
    "open": "formats:open",
    "write": "formats:write",
    "from_module": "formats.module:from_module",
    "into_module": "formats.module:into_module",
    "resize_": "graph.resize:resize_",
    # weights to weights
    "start": "init:start",
    "Cast": "edit.cast:Cast",
    "Rename": "edit.rename:Rename",
    "Prune": "edit.prune:Prune",
    "PruneNM": "edit.nm:PruneNM",
    "SparseGPT": "edit.sparsegpt:SparseGPT",
    "Quantize": "edit.quantize:Quantize",
    "Gptq": "edit.gptq:Gptq",
    "Awq": "edit.awq:Awq",
    "AdaRound": "edit.adaround:AdaRound",
    "Hqq": "edit.hqq:Hqq",
    "Factorize": "edit.lowrank:Factorize",
    "RateDistortion": "edit.ratedistortion:RateDistortion",
    "Share": "edit.share:Share",
    "Pack": "edit.pack:Pack",
    "Encode": "edit.encode:Encode",
    "Spare": "edit.spare:Spare",
    "Affine": "codecs.affine:Affine",
    "FloatGrid": "codecs.floatgrid:FloatGrid",
    "LowRank": "codecs.lowrank:LowRank",
    "Vectors": "codecs.vectors:Vectors",
    "Scaled": "codecs.scaled:Scaled",
    "Palette": "codecs.palette:Palette",
    "Bitmask": "codecs.bitmask:Bitmask",
    "NM": "codecs.nm:NM",
    "Delta": "codecs.delta:Delta",
    "Bits": "codecs.bits:Bits",
    "Entropy": "codecs.entropy:Entropy",
    "Multiples": "codecs.multiples:Multiples",
    "Trellis": "codecs.trellis:Trellis",
    # models and data
    "Task": "learn.task:Task",
    "Batch": "learn.task:Batch",
    "Interface": "learn.task:Interface",
    "Run": "learn.run:Run",
    "Step": "learn.step:Step",
    "Scheduler": "learn.schedules:Scheduler",
    "task": "learn.tasks:task",
    "model": "learn.models:model",
    "train": "learn.run:train",
    "penalize": "learn.penalize:penalize",
    "L1": "learn.penalties:L1",
    "L2": "learn.penalties:L2",
    "ElasticNet": "learn.penalties:ElasticNet",
    "GroupL1": "learn.penalties:GroupL1",
    "L2SP": "learn.penalties:L2SP",
    "Spectral": "learn.penalties:Spectral",
    "EntropyRate": "learn.levels:EntropyRate",
    "levelled": "learn.levels:levelled",
    "straight_through": "learn.levels:straight_through",
    "adaptive_factors": "learn.penalties:adaptive_factors",
    "Decay": "learn.decay:Decay",
    "decay_groups": "learn.parameters:decay_groups",
    "Alarm": "learn.alarm:Alarm",
    "find_lr": "learn.rate:find_lr",
    "Average": "learn.average:Average",
    "Ema": "learn.average:Ema",
    "Swa": "learn.average:Swa",
    "greedy_soup": "learn.average:greedy_soup",
    "regularization_path": "learn.path:regularization_path",
    "ExampleLoss": "learn.examples:ExampleLoss",
    "GlobalMean": "learn.examples:GlobalMean",
    "class_weights": "learn.examples:class_weights",
    "importance_weights": "learn.examples:importance_weights",
    "effective_sample_size": "learn.examples:effective_sample_size",
    "BalancedSampler": "learn.balance:BalancedSampler",
    "weigh_classes": "learn.classes:weigh_classes",
    "balance_classes": "learn.classes:balance_classes",
    "Examples": "learn.data:Examples",
    "by_group": "learn.groups:by_group",
    "group_dro": "learn.groups:group_dro",
    "just_train_twice": "learn.groups:just_train_twice",
    "refit_head": "learn.groups:refit_head",
    "gain": "learn.gain:gain",
    "init_": "learn.start:init_",
    "mup": "learn.mup:mup",
    "coordinate_check": "learn.coordinates:coordinate_check",
    "evaluate": "learn.evaluate:evaluate",
    "sample": "learn.sample:sample",
    "shard": "learn.processes:shard",
    "score": "learn.evidence:score",
    "kronecker": "learn.kronecker:kronecker",
    "blockwise": "learn.blockwise:blockwise",
    "stepped": "learn.stepped:stepped",
    "rounded_weights": "learn.stepped:rounded_weights",
    "release": "learn.constrain:release",
    "compare": "learn.evaluate:compare",
    "generalization": "learn.generalization:generalization",
    "robustness": "learn.generalization:robustness",
    "corrupted": "learn.corrupt:corrupted",
    "label_noise": "learn.pool:label_noise",
    "folds": "learn.folds:folds",
    "cross_validate": "learn.folds:cross_validate",
    "finetune": "learn.finetune:finetune",
    "imitation": "learn.imitation:imitation",
    "Trajectory": "learn.trajectory:Trajectory",
    "Gradual": "learn.sparse:Gradual",
    "Scores": "learn.sparse:Scores",
    "train_sparse": "learn.sparse:train_sparse",
    "prune_blocks_": "learn.blocks:prune_blocks_",
    "prune_structured_": "learn.structured:prune_structured_",
    "watch": "learn.watch.session:watch",
    "watched": "learn.watch.reading:watched",
    "read_log": "learn.watch.reading:read_log",
    # what weights mean
    "inventory": "explain.inventory:inventory",
    "spectra": "explain.spectra:spectra",
    "redundancy": "explain.redundancy:redundancy",
    "diff": "explain.diff:diff",
    "health": "explain.health:health",
    "ancestor": "explain.diff.lineage:ancestor",
    "statistics": "explain.statistics:statistics",
    "signal": "explain.signal:signal",
    "compare_starts": "explain.starts:compare_starts",
    "contributions": "explain.contributions:contributions",
    "coefficients": "explain.coefficients:coefficients",
    "filters": "explain.filters:filters",
    "connection": "explain.address:connection",
    "capacity": "explain.capacity:capacity",
    "rank_gaps": "explain.capacity:rank_gaps",
    "probe": "explain.probes:probe",
    "Probes": "explain.probes:Probes",
    "memory": "explain.memory:memory",
    # small
    "choose": "shrinking.choosing:choose",
    "shrink": "shrinking.within:shrink",
    "shrink_weights": "shrinking.alone:shrink_weights",
    "with_weights": "deploy.graft:with_weights",
    "tighten": "shrinking.tight:tighten",
    "Tight": "shrinking.tight:Tight",
    "OnnxModule": "deploy.session:OnnxModule",
}

if TYPE_CHECKING:
    from steelyard.codecs.affine import Affine as Affine
    from steelyard.codecs.bitmask import Bitmask as Bitmask
    from steelyard.codecs.bits import Bits as Bits
    from steelyard.codecs.delta import Delta as Delta
    from steelyard.codecs.entropy import Entropy as Entropy
    from steelyard.codecs.floatgrid import FloatGrid as FloatGrid
    from steelyard.codecs.lowrank import LowRank as LowRank
    from steelyard.codecs.multiples import Multiples as Multiples
    from steelyard.codecs.nm import NM as NM
    from steelyard.codecs.palette import Palette as Palette
    from steelyard.codecs.scaled import Scaled as Scaled
    from steelyard.codecs.trellis import Trellis as Trellis
    from steelyard.codecs.vectors import Vectors as Vectors
    from steelyard.core.packed import Codec as Codec
    from steelyard.core.packed import Packed as Packed
    from steelyard.core.packed import nest as nest
    from steelyard.core.packed import pack as pack
    from steelyard.core.packed import smallest as smallest
    from steelyard.core.spec import DType as DType
    from steelyard.core.spec import Spec as Spec
    from steelyard.core.spec import dtype as dtype
    from steelyard.core.table import Table as Table
    from steelyard.core.transform import chain as chain
    from steelyard.core.transform import each as each
    from steelyard.core.transform import on as on
    from steelyard.core.weights import Weight as Weight
    from steelyard.core.weights import Weights as Weights
    from steelyard.core.where import where as where
    from steelyard.deploy.graft import with_weights as with_weights
    from steelyard.deploy.session import OnnxModule as OnnxModule
    from steelyard.edit.adaround import AdaRound as AdaRound
    from steelyard.edit.awq import Awq as Awq
    from steelyard.edit.cast import Cast as Cast
    from steelyard.edit.encode import Encode as Encode
    from steelyard.edit.gptq import Gptq as Gptq
    from steelyard.edit.hqq import Hqq as Hqq
    from steelyard.edit.lowrank import Factorize as Factorize
    from steelyard.edit.nm import PruneNM as PruneNM
    from steelyard.edit.pack import Pack as Pack
    from steelyard.edit.prune import Prune as Prune
    from steelyard.edit.quantize import Quantize as Quantize
    from steelyard.edit.ratedistortion import RateDistortion as RateDistortion
    from steelyard.edit.rename import Rename as Rename
    from steelyard.edit.share import Share as Share
    from steelyard.edit.spare import Spare as Spare
    from steelyard.edit.sparsegpt import SparseGPT as SparseGPT
    from steelyard.errors import SteelyardError as SteelyardError
    from steelyard.explain.address import connection as connection
    from steelyard.explain.capacity import capacity as capacity
    from steelyard.explain.capacity import rank_gaps as rank_gaps
    from steelyard.explain.coefficients import coefficients as coefficients
    from steelyard.explain.contributions import contributions as contributions
    from steelyard.explain.diff import diff as diff
    from steelyard.explain.diff.lineage import ancestor as ancestor
    from steelyard.explain.filters import filters as filters
    from steelyard.explain.health import health as health
    from steelyard.explain.inventory import inventory as inventory
    from steelyard.explain.memory import memory as memory
    from steelyard.explain.probes import Probes as Probes
    from steelyard.explain.probes import probe as probe
    from steelyard.explain.redundancy import redundancy as redundancy
    from steelyard.explain.signal import signal as signal
    from steelyard.explain.spectra import spectra as spectra
    from steelyard.explain.starts import compare_starts as compare_starts
    from steelyard.explain.statistics import statistics as statistics
    from steelyard.formats import open as open
    from steelyard.formats import write as write
    from steelyard.formats.module import from_module as from_module
    from steelyard.formats.module import into_module as into_module
    from steelyard.graph.resize import resize_ as resize_
    from steelyard.init import start as start
    from steelyard.learn.alarm import Alarm as Alarm
    from steelyard.learn.average import Average as Average
    from steelyard.learn.average import Ema as Ema
    from steelyard.learn.average import Swa as Swa
    from steelyard.learn.average import greedy_soup as greedy_soup
    from steelyard.learn.balance import BalancedSampler as BalancedSampler
    from steelyard.learn.blocks import prune_blocks_ as prune_blocks_
    from steelyard.learn.blockwise import blockwise as blockwise
    from steelyard.learn.classes import balance_classes as balance_classes
    from steelyard.learn.classes import weigh_classes as weigh_classes
    from steelyard.learn.constrain import release as release
    from steelyard.learn.coordinates import coordinate_check as coordinate_check
    from steelyard.learn.corrupt import corrupted as corrupted
    from steelyard.learn.data import Examples as Examples
    from steelyard.learn.decay import Decay as Decay
    from steelyard.learn.evaluate import compare as compare
    from steelyard.learn.evaluate import evaluate as evaluate
    from steelyard.learn.evidence import score as score
    from steelyard.learn.examples import ExampleLoss as ExampleLoss
    from steelyard.learn.examples import GlobalMean as GlobalMean
    from steelyard.learn.examples import class_weights as class_weights
    from steelyard.learn.examples import effective_sample_size as effective_sample_size
    from steelyard.learn.examples import importance_weights as importance_weights
    from steelyard.learn.finetune import finetune as finetune
    from steelyard.learn.folds import cross_validate as cross_validate
    from steelyard.learn.folds import folds as folds
    from steelyard.learn.gain import gain as gain
    from steelyard.learn.generalization import generalization as generalization
    from steelyard.learn.generalization import robustness as robustness
    from steelyard.learn.groups import by_group as by_group
    from steelyard.learn.groups import group_dro as group_dro
    from steelyard.learn.groups import just_train_twice as just_train_twice
    from steelyard.learn.groups import refit_head as refit_head
    from steelyard.learn.imitation import imitation as imitation
    from steelyard.learn.kronecker import kronecker as kronecker
    from steelyard.learn.levels import EntropyRate as EntropyRate
    from steelyard.learn.levels import levelled as levelled
    from steelyard.learn.levels import straight_through as straight_through
    from steelyard.learn.models import model as model
    from steelyard.learn.mup import mup as mup
    from steelyard.learn.parameters import decay_groups as decay_groups
    from steelyard.learn.path import regularization_path as regularization_path
    from steelyard.learn.penalize import penalize as penalize
    from steelyard.learn.penalties import L1 as L1
    from steelyard.learn.penalties import L2 as L2
    from steelyard.learn.penalties import L2SP as L2SP
    from steelyard.learn.penalties import ElasticNet as ElasticNet
    from steelyard.learn.penalties import GroupL1 as GroupL1
    from steelyard.learn.penalties import Spectral as Spectral
    from steelyard.learn.penalties import adaptive_factors as adaptive_factors
    from steelyard.learn.pool import label_noise as label_noise
    from steelyard.learn.processes import shard as shard
    from steelyard.learn.rate import find_lr as find_lr
    from steelyard.learn.run import Run as Run
    from steelyard.learn.run import train as train
    from steelyard.learn.sample import sample as sample
    from steelyard.learn.schedules import Scheduler as Scheduler
    from steelyard.learn.sparse import Gradual as Gradual
    from steelyard.learn.sparse import Scores as Scores
    from steelyard.learn.sparse import train_sparse as train_sparse
    from steelyard.learn.start import init_ as init_
    from steelyard.learn.step import Step as Step
    from steelyard.learn.stepped import rounded_weights as rounded_weights
    from steelyard.learn.stepped import stepped as stepped
    from steelyard.learn.structured import prune_structured_ as prune_structured_
    from steelyard.learn.task import Batch as Batch
    from steelyard.learn.task import Interface as Interface
    from steelyard.learn.task import Task as Task
    from steelyard.learn.tasks import task as task
    from steelyard.learn.trajectory import Trajectory as Trajectory
    from steelyard.learn.watch.reading import read_log as read_log
    from steelyard.learn.watch.reading import watched as watched
    from steelyard.learn.watch.session import watch as watch
    from steelyard.shrinking.alone import shrink_weights as shrink_weights
    from steelyard.shrinking.choosing import choose as choose
    from steelyard.shrinking.tight import Tight as Tight
    from steelyard.shrinking.tight import tighten as tighten
    from steelyard.shrinking.within import shrink as shrink

__all__ = sorted(_EXPORTS)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'steelyard' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    try:
        return getattr(import_module(f"steelyard.{module}"), attribute)
    except ModuleNotFoundError as error:
        from steelyard.errors import missing_extra

        raise missing_extra(error, f"steelyard.{name}") or error from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
