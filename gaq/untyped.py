"""Names for values that have no type: each stands for ``Any``, and its comment is the reason, given once.

Use one only where a real type is not to be had. A type checker checks nothing of such a value, so a value that is only
passed on, compared or printed is an ``object`` instead. `Any` itself is for arguments by name that go to a function
with types of its own, and for what a module offers by ``__getattr__``. This module may be embedded in a package of
NequIP, so it imports nothing but typing.
"""

from collections.abc import Mapping
from typing import Any

# What JSON, YAML or a pickle holds under texts: configurations, metrics, metadata. Type checkers do not know the type
# of an entry before it is looked at, and a recursive type would have every reader ask for each level's type again.
Document = dict[str, Any]
ReadOnlyDocument = Mapping[str, Any]

# Arguments by name that are handed on to a function with a signature of its own.
Options = dict[str, Any]

# A module of MACE, NequIP, Allegro or e3nn whose own attributes are read. Only one framework is installed at a time,
# and torch types every attribute of a module as `Tensor | Module`. Where none is read, it is a `torch.nn.Module`.
AnyModule = Any

# A framework's batch of graphs: a `Batch` of torch_geometric in MACE, a dictionary of tensors in NequIP.
Batch = Any

# A framework's loader of training data. Torch declares no length of its dataset, and NequIP adds to it.
Loader = Any

# A labelled or plain structure, as the framework's own loaders give them: `Atoms`, `AtomicData` or a dictionary.
Structure = Any

# A calculator of ASE or of a framework. ASE gives the base class no types for what is read here, and what a framework
# adds (its models, its cutoff) is on no base class.
Calculator = Any

# `Irreps` and instructions of e3nn, which has no types.
Irreps = Any
Instructions = Any

# `ctx` of an autograd function: torch's own type has none of the attributes that functions set on it.
Context = Any

# A registered operation (`CustomOpDef`, `OpOverload`), whose attributes and calls torch does not type.
Operation = Any

# A kernel of Triton, which has no types.
TritonKernel = Any

# Lightning's trainer and NequIP's training module: what is read from them (`datamodule`, `ema`) is not on their base
# classes.
Trainer = Any
TrainingModule = Any

# A module of Python or a class of a framework whose functions are replaced at run time, which no type describes.
Patched = Any
