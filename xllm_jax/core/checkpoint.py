"""Checkpoints: what trained, the optimizer state, the data position, the identity of the base.

The home of orbax. A run's folder holds `checkpoints/STEP/` (trainable half, optimizer state, step,
data position) and `base/` is any folder written by `save_base` (a whole part, frozen or not). Saves
go to a temporary folder that is renamed when it is complete, so a killed run never leaves half a
checkpoint that could be picked up.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from xllm_jax.core import (
    atomic,
    checksum,
    damage,
    disk,
    interrupts,
    kept_checkpoints,
    new_folder,
    rules,
)
from xllm_jax.core.base_description import base_about
from xllm_jax.core.errors import UserError
from xllm_jax.core.streamed_leaf import Blocks, BlocksHandler, full
from xllm_jax.core.types import Params

INDEX_BYTES = 1 << 24
FORMAT = 1
TRIES = 30  # to remove what a failed save has left, 0.1 s apart
PARTIAL = ".orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished


class Checkpoints:
    """The checkpoints of one run, saved asynchronously: the last ones, and the best one.

    Args:
      directory: the run's folder, the same for all hosts.
      keep: how many of the last are kept.
      metric: scalar whose best checkpoint is kept too; '' for none.
      lowest: whether the lowest value of the metric is the best.
    """

    def __init__(self, directory: str | Path, keep: int = 2, metric: str = "", lowest: bool = True):
        self.directory = Path(directory).absolute() / "checkpoints"
        self._metric = metric
        options = kept_checkpoints.options(keep, metric, lowest)
        with disk.writing(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saving: Path = self.directory

    def __enter__(self) -> Checkpoints:
        if jax.process_index() == 0:
            self._remove_partial()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif jax.process_count() == 1:  # several hosts may not wait for one another any more
            with interrupts.held_back():
                with contextlib.suppress(Exception):  # what ended the run is told already
                    self.close()
                self._remove_partial()

    def _remove_partial(self) -> None:
        """Removes what killed and failed saves have left."""
        for _ in range(TRIES):  # threads of a save that was broken off may still write there
            left = list(self.directory.glob(f"*{PARTIAL}*"))
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            if not left:
                break
            time.sleep(0.1)

    def steps(self) -> list[int]:
        """Numbers of the complete checkpoints, ascending; waits for a save under way."""
        self.wait()
        self._manager.reload()  # another host may have set one aside
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, or None; waits for a save under way."""
        return (self.steps() or [None])[-1]

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        about: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving `state` (tree of arrays) and `about` (JSON: data position, stage, base).

        Every array's checksum is kept with them, so that `damage` can tell what has changed since.

        Args:
          metrics: holds the metric that the best checkpoint is chosen by; without it, this one is
            never the best while another has it.
        """
        about = {**about, "checksums": checksum.of_leaves(_leaves(state))}
        self.wait()  # for the one before, whose failure is its own
        self._saving = self.directory / str(step)
        with interrupts.held_back(), disk.writing(self._saving):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    about=ocp.args.JsonSave({**about, "hash": checksum.of_json(about)}),
                ),
                metrics=dict(metrics or {}) if self._metric else None,
                force=True,
            )

    def about(self, step: int) -> dict[str, Any]:
        """What was saved with the arrays of a checkpoint."""
        return damage.read_object(self.directory / str(step) / "about" / "metadata")

    def damage(self, step: int) -> str:
        """Reads a whole checkpoint on this host alone; says what is broken, '' when nothing is."""
        folder = self.directory / str(step)
        try:
            about = self.about(step)
            if about.pop("hash", None) not in (None, checksum.of_json(about)):
                return "about/metadata no longer says what was saved"
            sums = about.get("checksums", {})
            for path, store in _stores(folder / "state", _leaves(_stored(folder))).items():
                older = checksum.is_older(sums.get(path, checksum.NAME))
                found = checksum.of_store(store, store.dtype.numpy_dtype, older)
                if path in sums and sums[path] != found:
                    return f"{path} no longer has the values that were saved"
        except (UserError, *damage.ERRORS) as error:
            return " ".join(str(error).split())[:300]
        return ""

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way, for a person to look at.

        Raises:
          CannotWrite, UserError: the run's folder does not let it be moved.
        """
        target = self.directory.with_name("damaged") / f"{step}-{time.time_ns()}"
        if target.parent.is_symlink():
            raise UserError("is a link", field=str(target.parent), hint="Remove it")
        disk.make_folder(target.parent)
        with disk.writing(target):
            return (self.directory / str(step)).rename(target)

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the arrays of a checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
          UserError: the checkpoint holds other leaves or shapes than `like`, or is damaged.
        """
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            with damage.reading(self.directory / str(step), ValueError, KeyError, TypeError):
                return self._manager.restore(step, args=wanted)["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"does not fit this stage: {self._difference(step, like) or error}",
                field=str(self.directory / str(step)),
                hint="Resume with the configuration that wrote it, or choose a new --workdir",
            ) from error

    def _difference(self, step: int, like: Mapping[str, Any]) -> str:
        """The first leaf in which a checkpoint and `like` differ, in words."""
        held, wanted = _shapes(_stored(self.directory / str(step))), _shapes(like)
        for path in sorted(held.keys() | wanted.keys()):
            if path not in held:
                return f"it lacks {path}"
            if path not in wanted:
                return f"it has {path}, the stage does not"
            if held[path] != wanted[path]:
                return f"{path} has shape {held[path]}, the stage {wanted[path]}"
        return ""

    def check(self) -> None:
        """Raises what the last save raised, if it has ended; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
          CannotWrite: the disk does not let it be written.
        """
        with disk.writing(self._saving, also=(ValueError, OSError)):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        with disk.writing(self._saving, also=(ValueError, OSError)):
            self._manager.close()


def _stored(folder: Path) -> Any:
    """Tree of what a checkpoint says that its arrays are."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(folder / "state").item_metadata.tree


def _leaves(tree: object) -> dict[str, Any]:
    """{path: leaf} of any tree; an optimizer's tuples are numbered, as they are on disk."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in leaves}


def _shapes(tree: object) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}


def save_base(
    directory: str | Path,
    params: Params,
    about: Mapping[str, Any],
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes parameter subtrees `{part: tree}` as a base that `init` can name; atomic.

    An existing base of the same name is replaced only once the new one is complete; after an error
    nothing is left.

    Args:
      directory: the base's folder.
      params: nested dicts of arrays, or of `Blocks` throughout.
      about: JSON that is kept with the arrays.
      finish: writes further files into the folder that it is given, before it gets its name.

    Raises:
      CannotWrite: the disk does not let it be written; names the leaf of `Blocks`.
      UserError: another command writes the folder.
    """
    directory = Path(directory).absolute()
    main = jax.process_index() == 0
    partial = new_folder.partial_folder(directory)
    with new_folder.new_folder(directory) if main else contextlib.nullcontext():
        with disk.writing(directory, also=(ValueError, OSError)):
            _save_params(partial / "params", params)  # every host writes what it holds
        if main:
            _describe(partial, params, about, finish)
    if jax.process_count() > 1:  # no host goes on before the folder has its name
        multihost_utils.sync_global_devices("base written")


def _describe(
    partial: Path,
    params: Params,
    about: Mapping[str, Any],
    finish: Callable[[Path], None] | None,
) -> None:
    shapes = {p: [list(x.shape), str(x.dtype)] for p, x in rules.flatten(params).items()}
    atomic.write_json(partial / "about.json", {"format": FORMAT, **about, "shapes": shapes})
    if finish:
        finish(partial)


def base_exists(directory: str | Path) -> bool:
    """Whether a base is there."""
    return (atomic.whole_folder(directory) / "about.json").exists()


def _save_params(path: Path, params: Params) -> None:
    if not all(isinstance(leaf, Blocks) for leaf in rules.flatten(params).values()):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, dict(params))
        return
    writer = BlocksHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (Blocks, writer), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(dict(params)))
    except (ValueError, OSError) as error:
        raise (writer.failure or full(str(path), error)) from error
    if writer.failure:
        raise writer.failure


def open_leaves(directory: str | Path) -> dict[str, tensorstore.TensorStore]:
    """Opens the leaves of a base without reading them.

    Returns:
      {path: store}; a store has `.shape`, `.dtype.numpy_dtype`, and `store[index].read().result()`
      reads a part of it.

    Raises:
      UserError: no base there, or a damaged one.
    """
    shapes = base_about(directory)["shapes"]
    with damage.reading(directory):
        stores = _stores(atomic.whole_folder(directory) / "params", shapes)
        for path, store in stores.items():
            if list(store.shape) != shapes[path][0]:
                raise ValueError(f"{path} has the shape {store.shape}, not {shapes[path][0]}")
    return stores


def _stores(folder: Path, paths: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
    """{path: tensorstore of the leaf} of the arrays in a folder of orbax, opened, not read."""
    file = {"driver": "file", "path": f"{folder.absolute()}/"}
    packed = (folder / "manifest.ocdbt").exists()

    def kvstore(path: str) -> dict[str, Any]:
        name = path.replace("/", ".")
        if packed:
            return {"driver": "ocdbt", "base": file, "path": f"{name}/"}
        return file | {"path": f"{folder.absolute()}/{name}/"}

    # The list of all leaves is read once, and not again for each of them.
    shared = tensorstore.Context({"cache_pool": {"total_bytes_limit": INDEX_BYTES}})
    opening = {
        path: tensorstore.open(
            {"driver": "zarr", "kvstore": kvstore(path)}, open=True, context=shared
        )
        for path in paths
    }
    return {path: future.result() for path, future in opening.items()}


def load_leaves(
    directory: str | Path,
    prefix: str,
    like: Mapping[str, jax.ShapeDtypeStruct],
    exact: bool = True,
    unread: Collection[str] = (),
) -> dict[str, jax.Array]:
    """Reads one subtree of a base into the shapes, dtypes and shardings of `like`.

    Args:
      directory: folder written by `save_base`.
      prefix: path of the subtree inside the base, such as 'llm' or 'speech_interface/cif'.
      like: {path: `jax.ShapeDtypeStruct` with sharding}, flat, every path below `prefix`.
      exact: refuse a base that holds more leaves below `prefix` than `like` and `unread`.
      unread: paths that the base should hold, too, and that are not wanted.

    Returns:
      {path: array}, flat.

    Raises:
      UserError: no such subtree, a leaf missing or extra, or another shape; names the leaf.
    """
    about = base_about(directory)
    held = {path: shape for path, shape in about["shapes"].items() if path not in unread}
    _check_leaves(directory, prefix, held, like, exact)
    target = rules.unflatten(like)
    restore_args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding, global_shape=x.shape),
        target,
    )
    with (
        damage.reading(directory),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        found = checkpointer.restore(
            atomic.whole_folder(directory) / "params",
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=True
            ),
        )
    return rules.flatten(found)


def _check_leaves(
    directory: str | Path, prefix: str, shapes: dict, like: Mapping, exact: bool
) -> None:
    stored = {p: s for p, s in shapes.items() if p == prefix or p.startswith(prefix + "/")}
    if not stored:
        parts = ", ".join(sorted({path.split("/")[0] for path in shapes}))
        raise UserError(
            f"holds no {prefix!r}, only {parts}",
            field=str(directory),
            hint="Name the part after a colon: DIR:part",
        )
    for path in sorted(stored.keys() ^ like.keys() if exact else like.keys() - stored.keys()):
        where = "lacks" if path in like else "has, but the model does not,"
        raise UserError(
            f"the checkpoint {where} {path}",
            field=str(directory),
            hint="It belongs to another architecture; check parts.*.size and fields",
        )
    for path, leaf in like.items():
        if tuple(stored[path][0]) != tuple(leaf.shape):
            raise UserError(
                f"{path} has shape {tuple(stored[path][0])}, the model {tuple(leaf.shape)}",
                field=str(directory),
                hint="The checkpoint is of another size; check parts.*.size and fields",
            )
