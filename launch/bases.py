"""Converts the embedded world's backbones, which ship with the package, into bases for `init`.

python launch/bases.py --output=bases
python launch/bases.py --output=bases --export=runs   # maintainers: ship newly trained ones
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
from absl import flags

import xllm_jax
from configs import world_llm, world_vision
from launch import command
from xllm_jax import build
from xllm_jax.convert import world
from xllm_jax.core import mesh

OUTPUT = flags.DEFINE_string("output", "bases", "Folder of the bases.")
EXPORT = flags.DEFINE_string("export", "", "Folder of the runs whose results shall be shipped.")

SHIPPED = Path(xllm_jax.__file__).parent / "data" / "world" / "backbones"


def main(_: list[str]) -> None:
    output = Path(OUTPUT.value)
    if EXPORT.value:
        export(Path(EXPORT.value))
    world.import_llm(SHIPPED / "llm", output / "llm")
    vision = build.model(world_vision.get_config()).networks["vision_encoder"]
    world.import_vision(vision, SHIPPED / "vision_encoder", output / "vision_encoder")
    shutil.copy(SHIPPED / "vocab.txt", output / "vocab.txt")
    print(f"Bases: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}")


def export(runs: Path) -> None:
    """Puts the results of the two pre-training runs into the package, in the published forms."""
    for name, stage in (
        ("llm", world_llm.get_config()),
        ("vision_encoder", world_vision.get_config()),
    ):
        stage.init = {name: str(runs / stage.name)}
        xllm = build.model(stage)
        params = build.parameters(stage, xllm, mesh.make({}, jax.devices()[:1]))[name]
        if name == "llm":
            world.export_llm(xllm.networks[name], params, SHIPPED / name, SHIPPED / name)
        else:
            world.export_vision(xllm.networks[name], params, SHIPPED / name)


if __name__ == "__main__":
    command.run(main)
