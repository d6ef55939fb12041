"""What people ask the world to draw: some objects, and whatever is said of them.

A request says less than a scene holds: what it leaves open (a size, a place) may be anything. Every
request comes with one scene that fulfils it, so that pictures for training are right by
construction, and `evaluation/scene_reader.py` says which of the asked things a picture shows.

A caption says all of a picture. The one of a request (`caption`) adds what was left open, always
in the same way, as an LLM does that writes a detailed prompt for what it is asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from xllm_jax.data.synthetic_world import language
from xllm_jax.data.synthetic_world.scene import (
    ALL_PAIRS,
    PLACES,
    SEEN_PAIRS,
    SIZES,
    Object,
    Scene,
    choose,
    sample_scene,
)

# Pictures that are drawn from words have no texture and no grain: no word asks for them.
SMOOTH = "gradient"
# Where the first object stands, seen from the second: (columns, rows) of the grid.
RELATIONS = {"左边": (-1, 0), "右边": (1, 0), "上面": (0, -1), "下面": (0, 1)}
# In a caption the first stands where the relation says, and the second opposite; and objects of
# which nobody says where, by their number.
OPPOSITE = {"左边": "右边", "右边": "左边", "上面": "下面", "下面": "上面"}
ABREAST = {1: ("中间",), 2: ("左边", "右边"), 3: ("左边", "中间", "右边")}
LARGE = "大"  # of which nobody says how large they are
# Requests for a picture that is shown in another color; COLOR is its place.
COLOR = "{color}"
EDITS = (
    "画一张一样的图，但是{color}的",
    "请画一张一样的图，但是{color}的",
    "请画同样的图，但是都是{color}的",
)
SHARES = {"plain": 0.35, "placed": 0.3, "repeated": 0.1, "related": 0.25}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One object as it was asked for; an empty word was not said."""

    shape: str
    color: str
    size: str = ""
    place: str = ""

    def fits(self, item: Object) -> bool:
        """Whether an object is what was asked for."""
        said = dataclasses.asdict(self)
        return all(word in ("", getattr(item, name)) for name, word in said.items())


@dataclasses.dataclass(frozen=True)
class Request:
    """Objects to be drawn, these and no others.

    Attributes:
      objects: what was asked for, in the order of `said`.
      said: how it is said, a phrase without a full stop.
      scene: one picture that fulfils it.
      relation: where the first object stands, seen from the second; a key of RELATIONS or ''.
      kind: of request, a key of SHARES.
    """

    objects: tuple[Wanted, ...]
    said: str
    scene: Scene
    relation: str = ""
    kind: str = ""

    @property
    def unseen(self) -> bool:
        """Whether any object is a held-out pair."""
        return self.scene.unseen


def sample_request(
    rng: np.random.Generator,
    pairs: str = "seen",
    unseen_wording: bool = False,
    shares: Mapping[str, float] = SHARES,
) -> Request:
    """Draws a request.

    Args:
      rng: source of randomness.
      pairs: see `scene.sample_scene`.
      unseen_wording: take the descriptions that are kept for the test.
      shares: {kind, a key of SHARES: how often, in relation to the others}.
    """
    weights = np.asarray(list(shares.values()))
    kind = str(rng.choice(list(shares), p=weights / weights.sum()))
    made = KINDS[kind](rng, pairs, unseen_wording)
    scene = dataclasses.replace(made.scene, background=SMOOTH)
    return dataclasses.replace(made, scene=scene, kind=kind)


def caption(request: Request) -> str:
    """The picture that a request is answered with: every object with its size and place.

    Objects that no place was named for stand side by side in the order of the request, or opposite
    each other as their relation is; they are large where no size was named.
    """
    wanted = request.objects
    if request.relation:
        places = (request.relation, OPPOSITE[request.relation])
    elif all(one.place for one in wanted):
        places = tuple(one.place for one in wanted)
    else:
        places = ABREAST[len(wanted)]
    items = [
        Object(one.shape, one.color, one.size or LARGE, place) for one, place in zip(wanted, places)
    ]
    return language.inventory(sorted(items, key=lambda item: PLACES.index(item.place)))


def recolored(scene: Scene, color: str) -> Request:
    """The request for a scene in which all objects have a color, on a plain background."""
    objects = tuple(dataclasses.replace(item, color=color) for item in scene.objects)
    wanted = tuple(Wanted(**dataclasses.asdict(item)) for item in objects)
    changed = dataclasses.replace(scene, objects=objects, background=SMOOTH)
    return Request(wanted, language.inventory(objects), changed, kind="edit")


def _plain(rng: np.random.Generator, pairs: str, unseen_wording: bool) -> Request:
    """Objects of some looks, anywhere: 一个大的红色圆形和一个蓝色方形."""
    scene = sample_scene(rng, pairs)
    sized = rng.random(len(scene.objects)) < 0.4
    wanted = tuple(
        Wanted(item.shape, item.color, item.size if told else "")
        for item, told in zip(scene.objects, sized)
    )
    order = tuple(wanted[int(i)] for i in rng.permutation(len(wanted)))
    first, *others = (f"一个{_look(one)}" for one in order)
    joined = "，".join([first, *others[:-1]])
    return Request(order, "和".join([joined, *others[-1:]]), scene)


def _placed(rng: np.random.Generator, pairs: str, unseen_wording: bool) -> Request:
    """Every object with its place, in the words of captions."""
    scene = sample_scene(rng, pairs)
    wanted = tuple(Wanted(**dataclasses.asdict(item)) for item in scene.objects)
    return Request(wanted, language.caption(scene, rng, unseen_wording).rstrip("。"), scene)


def _repeated(rng: np.random.Generator, pairs: str, unseen_wording: bool) -> Request:
    """Two or three objects of one look: 三个红色圆形."""
    count = int(rng.integers(2, 4))
    shape, color = _pair(rng, pairs)
    places = sorted(int(place) for place in rng.choice(len(PLACES), count, replace=False))
    size = choose(rng, SIZES)
    objects = tuple(Object(shape, color, size, PLACES[place]) for place in places)
    wanted = Wanted(shape, color, size if rng.random() < 0.4 else "")
    scene = Scene(objects, SMOOTH, int(rng.integers(2**31)))
    return Request((wanted,) * count, language.NUMBERS[count] + _look(wanted), scene)


def _related(rng: np.random.Generator, pairs: str, unseen_wording: bool) -> Request:
    """Two objects side by side or one above the other: 红色圆形在蓝色方形的左边."""
    relation = choose(rng, tuple(RELATIONS))
    scene = sample_scene(rng, pairs, count=2)
    column, row = RELATIONS[relation]
    cells = [divmod(place, 3) for place in range(len(PLACES))]
    first, second = choose(
        rng,
        [
            (a, b)
            for a, b in itertools.permutations(cells, 2)
            if (_sign(a[1] - b[1]), _sign(a[0] - b[0])) == (column, row)
        ],
    )
    placed = [
        dataclasses.replace(item, place=PLACES[3 * cell[0] + cell[1]])
        for item, cell in zip(scene.objects, (first, second))
    ]
    wanted = tuple(Wanted(item.shape, item.color) for item in placed)
    said = f"{_look(wanted[0])}在{_look(wanted[1])}的{relation}"
    objects = tuple(sorted(placed, key=lambda item: PLACES.index(item.place)))
    return Request(wanted, said, dataclasses.replace(scene, objects=objects), relation)


KINDS: Mapping[str, Callable[[np.random.Generator, str, bool], Request]] = {
    "plain": _plain,
    "placed": _placed,
    "repeated": _repeated,
    "related": _related,
}


def _pair(rng: np.random.Generator, pairs: str) -> tuple[str, str]:
    if pairs == "unseen":
        return sample_scene(rng, pairs, count=1).objects[0].pair
    return choose(rng, ALL_PAIRS if pairs == "all" else SEEN_PAIRS)


def _look(wanted: Wanted) -> str:
    return (
        f"{wanted.size}的{wanted.color}{wanted.shape}"
        if wanted.size
        else (f"{wanted.color}{wanted.shape}")
    )


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
