"""What is checked: a network, and what its own methods do not tell about it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.assembly import networks
from xllm_jax.convert import Row
from xllm_jax.core import lookup, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part, Stage
from xllm_jax.core.types import Params

LLM, ENCODER, INTERFACE = "LLM", "encoder", "interface"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network under test. A function of yours returns one; only `part` is needed.

    Attributes:
      part: names the network, as in a stage; of a small size.
      rows: the table of its converter, made from the network; targets are its parameter paths.
      fresh: path patterns of parameters that the published file does not hold.
      reference: the published computation, such as the PyTorch class: {name in the published file:
        array} and the float32 arguments of the network's call to its first result.
      still: path patterns of parameters that never get a gradient in training, such as the running
        statistics of a BatchNorm.
      unused: {pattern of SHARDING: why this network has no such parameter}, for rows that it shares
        with others.
      bound: how much further bfloat16 may be from float32 than float32 with parameters that are
        rounded to bfloat16; root mean squares.
    """

    part: Part
    rows: Callable[[Any], Sequence[Row]] | None = None
    fresh: tuple[str, ...] = ()
    reference: Callable[..., np.ndarray] | None = None
    still: tuple[str, ...] = ()
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bound: float = 4.0

    def network(self, compute: str = "float32") -> Any:
        """Its network, computing in a dtype.

        Raises:
          UserError: unknown network, size or field.
        """
        return networks.network(self.part, Stage(compute=compute, frozen=compute), "network")

    @property
    def sharding(self) -> rules.Rules:
        """SHARDING of the network's file."""
        return lookup.attribute(networks.MODELS, self.part.network, "network")[0].SHARDING


def find(name: str, packaged: Mapping[str, Subject]) -> Subject:
    """The subject that a user named.

    Args:
      name: a key of `packaged`, 'file.Class' under `xllm_jax/models`, or 'module:NAME' of a network
        class, or of a function that returns a `Subject` or a `Part`.
      packaged: {name: subject}.

    Raises:
      UserError: there is no such thing.
    """
    if name in packaged:
        return packaged[name]
    if ":" not in name and "." not in name:
        hint = f"Choices: {', '.join(packaged)}; or module:function of your own"
        raise UserError(f"no network {name!r}", field="NETWORK", hint=hint)
    _, found = lookup.attribute(networks.MODELS, name, "NETWORK")
    if isinstance(found, type):
        return Subject(Part(name, "tiny"))
    made = found() if callable(found) else found
    if isinstance(made, Part):
        made = Subject(made)
    if not isinstance(made, Subject):
        what = f"{name} gives a {type(made).__name__}"
        raise UserError(what, field="NETWORK", hint="Let it return a Subject or a Part")
    return made


def role(network: Any) -> str:
    """LLM, ENCODER or INTERFACE, by the methods and arguments of a network.

    Raises:
      UserError: it is of no such kind.
    """
    kind = type(network)
    if all(hasattr(kind, name) for name in ("embed", "logits", "init_cache", "example")):
        return LLM
    arguments = inspect.signature(kind.__call__).parameters
    if {"lengths", "train"} <= arguments.keys() and hasattr(kind, "example"):
        return INTERFACE if "counts" in arguments else ENCODER
    raise UserError(
        f"{kind.__name__} is no LLM, encoder or interface",
        field="NETWORK",
        hint="See CONTRIBUTING.md: the methods of models/glm.py, or the call of models/vit.py or "
        "models/interfaces.py",
    )


def lively(network: Any, seed: int = 0) -> Params:
    """Float32 parameters of which none is zero or equals its neighbor, as NumPy arrays.

    Fresh ones will not do: biases are zeros, and attention is nearly uniform. Networks that are
    equal share them, since drawing is compiled for each.
    """
    try:
        drawn = _drawn(network, seed)
    except TypeError:  # a field that has no hash, such as a dict
        drawn = _drawn.__wrapped__(network, seed)
    return jax.tree.map(np.copy, drawn)


@functools.lru_cache(maxsize=2)
def _drawn(network: Any, seed: int) -> Params:
    drawn = jax.jit(lambda key: networks.init_params(network, key))(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32), drawn
    )


def rounded(params: Params, dtype: str = "bfloat16") -> Params:
    """The parameters rounded to bfloat16, in a dtype, as NumPy arrays."""
    return jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16).astype(jnp.dtype(dtype)), params
    )
