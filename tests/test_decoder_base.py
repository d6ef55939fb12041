"""A converted decoder draws by its own records: the recording's pictures, as files, by command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import small_outputs
import small_runs
import test_flags
from absl import flags
from absl.testing import flagsaver
from conftest import GOLDEN
from PIL import Image

from xllm_jax.convert import run_import
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Output
from xllm_jax.core.suite import PictureSuite
from xllm_jax.data.example import Example
from xllm_jax.evaluation.suites import pictures
from xllm_jax.inference import assistant, decoder_base, load_run
from xllm_jax.inference.replies import Picture, Reply
from xllm_jax.launch import chat, drawing, serve

pytestmark = pytest.mark.usefixtures("parsed_flags")
ROOT = Path(__file__).parents[1]
RECORDED = GOLDEN / "diffusion"
PLACE = "runs/bases/image_decoder"


def config(part):
    """Sizes of the recorded pipeline."""
    return json.loads((RECORDED / "sd" / part / "config.json").read_text())


LENGTH, WIDTH = (config("text_encoder")[k] for k in ("max_position_embeddings", "hidden_size"))
FACTOR = 2 ** (len(config("vae")["block_out_channels"]) - 1)
HEIGHT, BREADTH = SIDES = (4 * FACTOR, 6 * FACTOR)
SIZE = f"{HEIGHT}x{BREADTH}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run, and beside it a decoder whose text encoder it was aligned with."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "runs/bases").mkdir(parents=True)
    run_import.run_import("stable_diffusion", RECORDED / "sd", folder / PLACE)
    text = json.loads((folder / PLACE / "conversion.json").read_text())["options"]["text_encoder"]
    stage = small_outputs.stage(folder)
    length, width = text["fields"]["positions"], text["fields"]["width"]
    stage.parts["image_projection"].fields |= {"queries": length, "output_width": width}
    stage.parts["text_encoder"].fields |= {"positions": length, "width": width}
    stage.data.caption_length = length
    stage.outputs = {"image": Output("image_projection", "text_encoder", PLACE)}
    small_runs.write_run(stage, folder / "runs/drawn", ("signal_tokens", "image_projection"))
    return folder


@pytest.fixture
def stage(home):
    return load_run.stage_of(home / "runs/drawn")


@pytest.fixture
def copy(home, tmp_path, stage):
    """A copy of the decoder that may be damaged, named by the stage."""
    shutil.copytree(home / PLACE, tmp_path / "decoder")
    stage.outputs["image"].decoder = str(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture(scope="module")
def cases():
    with np.load(RECORDED / "cases_pipeline.npz") as read:
        return {name: read[name] for name in read.files}


@pytest.fixture(scope="module")
def base(home):
    return decoder_base.look(home / PLACE)


@pytest.fixture(scope="module")
def renderer(base):
    return base.renderer()


def recorded(cases, name):
    return next(value for key, value in cases.items() if key.split("/")[-1] == name)


def test_the_recorded_pictures_come_out_of_a_base(renderer, base, cases):
    noise = np.moveaxis(recorded(cases, "latents"), 1, -1)
    given = recorded(cases, "prompt_embeds")
    without = recorded(cases, "negative_prompt_embeds")
    table = renderer.scheduler.table(int(recorded(cases, "num_inference_steps")))
    scale = float(recorded(cases, "guidance_scale"))
    latents, _ = renderer.latents(noise, given, table, scale, without)
    made = np.clip(np.asarray(renderer.decoded(latents)) / 2 + 0.5, 0, 1)
    wanted = recorded(cases, "pndm.image")
    wanted = np.moveaxis(wanted, 1, -1) if wanted.shape[1] == 3 else wanted
    np.testing.assert_allclose(made, wanted, atol=1e-4)
    factor = base.autoencoder.factor
    side = json.loads((RECORDED / "sd/unet/config.json").read_text())["sample_size"]
    assert base.size == (side * factor, side * factor)


def test_the_empty_text_is_the_base_s_own(renderer, cases):
    wanted = recorded(cases, "encoded.negative_prompt_embeds")[0]
    np.testing.assert_allclose(np.asarray(renderer.without), wanted, atol=1e-5)


def picture(seed=0):
    values = np.random.default_rng(seed).normal(size=(LENGTH, WIDTH))
    return Picture("image", values.astype(np.float32))


def pixels(file):
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        return np.array(opened)


def test_pictures_are_files_and_one_program_draws_them(stage, home, tmp_path):
    family = assistant.llm_family.load(stage.data)
    with flagsaver.flagsaver(steps=2, size=SIZE):
        write = drawing.writer(stage, str(tmp_path / "out"), 5)
        easel = drawing.Easel(tmp_path / "out", family, write)
        text = easel.text(Reply(("这是", picture(1), "和", picture(2))))
        painter = drawing._write(stage, "image", 5)
        assert "renderer" not in vars(painter)  # nothing is read before the first picture
    first, second = (tmp_path / f"out/image_{n}.png" for n in range(2))
    assert text == f"这是[{first}]和[{second}]"
    read = [pixels(file) for file in (first, second)]
    assert read[0].shape == (*SIDES, 3) and (read[0] != read[1]).any()
    for number in (2, 1):  # in another order, by another painter
        file = painter(picture(number), tmp_path / f"again_{number}")
        np.testing.assert_array_equal(pixels(file), read[number - 1])
        assert painter.renderer._draw._cache_size() == 1
        assert painter.renderer._decode._cache_size() == 1
    expected = painter.renderer(picture(1).embeddings[None], [5], size=SIDES, steps=2, guidance=7.5)
    np.testing.assert_array_equal(expected[0], read[0])


def test_the_command_draws(home, tmp_path):
    """Sampled until a picture comes: the untrained LLM says anything."""
    run = home / "runs/drawn"
    words = assistant.Assistant(load_run.load_run(run), max_tokens=200)
    how = words.decoding(sample=True, temperature=1e3)
    asked = chat.Example("prompt", (), "画圆")
    seed = next(n for n in range(20) if words.replies([asked], how, n)[0].pictures)
    sampled = ("--decode=sample", "--temperature=1e3", "--top_p=1", f"--seed={seed}")
    options = ("--max_tokens=200", "--steps=2", f"--size={HEIGHT}", "--scheduler=ddim")
    out = tmp_path / "out"
    asking = (f"--checkpoint={run}", "--prompt=画圆", f"--draw={out}", *sampled, *options)
    done = forked.xllm("generate", *asking)
    assert done.returncode == 0, done.stderr
    files = sorted(out.iterdir())
    assert files and all(f"[{file}]" in done.stdout for file in files)
    assert all(pixels(file).shape == (HEIGHT, HEIGHT, 3) for file in files)
    bad = forked.xllm("generate", *asking, "--scheduler=unipc")
    assert bad.returncode == 2 and "--scheduler: unknown scheduler 'unipc'" in bad.stderr
    assert len(bad.stderr.strip().splitlines()) == 1
    for flag in ("--steps=-1", "--guidance=-1"):
        bad = forked.xllm("generate", *asking, flag)
        assert bad.returncode == 2 and flag.partition("=")[0][2:] in bad.stderr
        assert len(bad.stderr.strip().splitlines()) == 1


def test_what_the_text_encoder_says_lies_beside_the_drawings(base, tmp_path):
    """As the suite of pictures reads it: each caption is nearest to itself, and to no other."""
    with test_flags.command("evaluate"):
        from xllm_jax.launch import evaluate_drawing

        said = {"a/1": "a cat", "a/2": "two dogs", "b": "a red ball"}
        asked = [Example(key, outputs=(("image", text),)) for key, text in said.items()]
        asked.append(Example("c", outputs=(("audio", "rain"),)))
        for folder in ("drawn", "wanted"):
            evaluate_drawing.write_wanted(base, "image", asked, tmp_path / folder, 2)
    files = {path.stem: np.load(path)["prompt_embeds"] for path in tmp_path.glob("wanted/*.npz")}
    assert sorted(files) == ["a_1", "a_2", "b"]
    for key, values in zip(("a_1", "a_2", "b"), base.conditions(list(said.values()))):
        np.testing.assert_allclose(files[key], values[None], atol=1e-5)
    given = PictureSuite(drawn=str(tmp_path / "drawn"), wanted=str(tmp_path / "wanted"))
    found = pictures._projected(given, asked[:3])
    assert found and found["value"] == 1 and found["missing"] == found["shuffled"]["value"] == 0


def test_without_a_decoder_the_folder_is_named(stage, tmp_path, capsys):
    stage.outputs["image"].decoder = "bases/nowhere"
    write = drawing.writer(stage, str(tmp_path), 0)
    assert capsys.readouterr().err.splitlines() == [
        "No decoder of image (no folder bases/nowhere): embeddings are written as .npz"
    ]
    assert write(picture(), tmp_path / "x") == tmp_path / "x.npz"
    steps = flags.FLAGS["steps"]
    with flagsaver.flagsaver():
        steps.parse("3")
        steps.present = 1
        with pytest.raises(UserError, match="--steps: has no effect without a decoder"):
            drawing.writer(stage, str(tmp_path), 0)
        with pytest.raises(UserError, match="--steps: has no effect without --draw"):
            drawing.check_unused()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size="17"), f"--size: 17 x 17 is no multiple of the autoencoder's factor {FACTOR}"),
        (dict(size="0"), "--size: 0 x 0"),
        (dict(size="16x"), "--size: '16x' is no size of a picture"),
        (dict(size="100000"), "--size: '100000' is no size"),
        (dict(scheduler="unipc"), "--scheduler: unknown scheduler 'unipc'"),
        (dict(guidance=float("nan")), "--guidance: is nan"),
        (dict(steps=1000), "--steps: 1000 steps"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(stage, tmp_path, options, message):
    with flagsaver.flagsaver(**options), pytest.raises(UserError, match=message) as error:
        drawing.writer(stage, str(tmp_path), 0)
    assert error.value.hint


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_picture_has_is_refused(stage, tmp_path, seed):
    with pytest.raises(UserError, match="--seed"):
        drawing.writer(stage, str(tmp_path), seed)


def test_a_file_is_no_folder_for_pictures(stage, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"--draw: .*file is no folder"):
            drawing.writer(stage, str(tmp_path / place), 0)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_decoder_of_another_width_is_refused(stage, tmp_path):
    stage.parts["image_projection"].fields["output_width"] = WIDTH + 1
    told = rf"outputs\.image\.decoder: .*{LENGTH} x {WIDTH} .* gives {LENGTH} x {WIDTH + 1}"
    with pytest.raises(UserError, match=told):
        drawing.writer(stage, str(tmp_path), 0)


@pytest.mark.parametrize(
    "name", ["about.json", "conversion.json", "scheduler/scheduler_config.json", "unet/config.json"]
)
def test_truncated_records_are_named(stage, copy, tmp_path, name):
    file = copy / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{file.name}: is damaged"):
        drawing.writer(stage, str(tmp_path), 0)


@pytest.mark.parametrize(
    "name", ["about.json", "conversion.json", "scheduler/scheduler_config.json", "tokenizer"]
)
def test_missing_components_are_named(stage, copy, tmp_path, name):
    file = copy / name
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(UserError, match=f"{copy}: (lacks|no base)"):
        drawing.writer(stage, str(tmp_path), 0)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_of_single_parts_is_no_decoder(stage, home, tmp_path, part):
    folder = tmp_path / "alone"
    run_import.run_import("stable_diffusion", RECORDED / "sd" / part, folder)
    stage.outputs["image"].decoder = str(folder)
    with pytest.raises(UserError, match=f"{folder}: lacks the part"):
        drawing.writer(stage, str(tmp_path), 0)


def test_a_truncated_component_is_named_at_the_first_picture(stage, copy, tmp_path):
    write = drawing.writer(stage, str(tmp_path / "out"), 0)
    for file in (copy / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{copy}: is damaged"):
        write(picture(), tmp_path / "out/image_0")
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_shape_are_named(copy):
    file = copy / "conversion.json"
    told = json.loads(file.read_text())
    told["options"]["text_encoder"]["fields"]["hidden"] += 8
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"text_encoder/layers/feed_forward/.* has shape"):
        decoder_base.look(copy).renderer()


def test_the_server_draws_by_the_same_flags(stage, base, tmp_path, capsys):
    with flagsaver.flagsaver(steps=2, picture_sizes=[f"{BREADTH}x{HEIGHT}"]):
        made = serve.easel(stage)
    assert made.sizes == {"image": (base.size, SIDES)} and made.style.steps == 2
    assert (
        made.size(f"{BREADTH}x{HEIGHT}", "image") == SIDES and made.size(None, "image") == base.size
    )
    with flagsaver.flagsaver(size=SIZE):
        assert serve.easel(stage).sizes == {"image": (SIDES,)}
    with (
        flagsaver.flagsaver(picture_sizes=[f"{BREADTH + 1}x{HEIGHT}"]),
        pytest.raises(UserError, match="multiple"),
    ):
        serve.easel(stage)
    stage.outputs["image"].decoder = str(tmp_path / "gone")
    assert serve.easel(stage) is None
    assert str(tmp_path / "gone") in capsys.readouterr().err
    with flagsaver.flagsaver():
        flags.FLAGS["draw_batch"].present = 1
        with pytest.raises(UserError, match="no effect"):
            serve.easel(stage)
