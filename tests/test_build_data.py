"""The paper's own constructions, recipe by recipe, on small files and through Beam."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import soundfile
from fake_endpoint import chinese, serving
from PIL import Image
from test_video import write as write_video

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.media import image, speech
from xllm_jax.data.rows import files
from xllm_jax.data.sources import aishell, prepared, selection, table, vsdial_cn
from xllm_jax.prepare import translate, translators
from xllm_jax.prepare.endpoint import Endpoint
from xllm_jax.prepare.recipes import instructions, questions, resampled, similar, translated
from xllm_jax.prepare.recipes import vsdial_cn as vsdial

ROOT = Path(__file__).parents[1]
WORDS = {"is it red?": "是红色的吗？", "how many?": "有几个？", "yes": "是", "two": "两个"}

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def beam():
    return pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return str(path)


def picture(path, gray=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (gray,) * 3).save(path)


def sound(path, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(rate) / 9) / 2, rate)


def hum(text):
    """A speech engine: as long as the text."""
    return np.sin(np.arange(4000 * len(text)) / 9).astype(np.float32) / 2


def test_a_file_of_any_size_is_read_row_by_row(tmp_path, monkeypatch):
    candidates = list(range(100))
    asked = [{"question": n, "answer": n, "answer_options": candidates} for n in range(30)]
    talks = [{"image_id": n, "caption": f"c{n}", "dialog": asked} for n in range(40)]
    data = {"questions": [f"q{n}?" for n in range(30)], "answers": [f"a{n}" for n in range(30)]}
    file = tmp_path / "visdial_1.0_train.json"
    write(file, {"data": data | {"dialogs": talks}})
    row = len(json.dumps(talks[0]))
    monkeypatch.setattr(files, "MOST", 2 * row)  # what may be read at once
    assert file.stat().st_size > 10 * files.MOST
    found = questions.read(str(tmp_path), "train")
    assert {name: found[name] for name in data} == data
    kept = [{k: v for k, v in one.items() if k != "answer_options"} for one in asked]
    assert found["dialogs"] == [{**talk, "dialog": kept} for talk in talks]
    assert questions.build(str(tmp_path), str(tmp_path / "texts"))["texts"] == 100
    table = {f"q{n}?": f"问{n}？" for n in range(2 * row)}
    assert translators.read_table(write(tmp_path / "table.json", table)) == table


@pytest.mark.parametrize(
    ("talk", "where"),
    [
        (7, r"dialogs\[1\]: is a number, not an object"),
        ({"dialog": [3]}, r"dialogs\[1\]\.dialog\[0\]: is a number"),
        ({"dialog": [{"question": 5}]}, r"dialog\[0\]\.question: 5 names no text"),
        ({"dialog": [{"question": -1}]}, r"dialog\[0\]\.question: -1 names no text"),
        ({"dialog": [{"question": 1}]}, r"dialog\[0\]\.question: 1 names no text"),
        ({"dialog": [{"question": 0, "answer": "yes"}]}, r"dialog\[0\]\.answer: is a text"),
        ({"dialog": [], "caption": [1]}, r"dialogs\[1\]\.caption: is a list"),
    ],
)
def test_dialogues_of_another_form_are_told_by_their_place(talk, where, tmp_path):
    good = {"dialog": [{"question": 0}]}
    data = {"questions": ["is it red?", 3], "answers": ["yes"], "dialogs": [good, talk]}
    write(tmp_path / "visdial_1.0_train.json", {"data": data})
    with pytest.raises(UserError, match=where):
        questions.build(str(tmp_path), str(tmp_path / "texts"))


@pytest.fixture
def visdial(beam, tmp_path):
    """Two dialogues; 'why?' has no translation, two questions differ in their signs alone."""
    asked = ((0, 0), (1, 1), (3, 0))
    rounds = [{"question": question, "answer": answer} for question, answer in asked]
    talks = [
        {"image_id": 7, "caption": "a red ball", "dialog": rounds},
        {"image_id": 8, "caption": "", "dialog": [{"question": 2, "answer": 0}]},
    ]
    texts = {"questions": ["is it red?", "how many?", "Is it red", "why?"], "answers": list(WORDS)}
    texts["answers"] = ["yes", "two"]
    write(tmp_path / "visdial/visdial_1.0_train.json", {"data": texts | {"dialogs": talks}})
    for number in (7, 8):
        picture(tmp_path / f"images/COCO_train2014_{number:012d}.jpg")
    return str(tmp_path / "visdial")


def test_the_texts_of_visdial_without_doubles(visdial, tmp_path):
    counts = questions.build(visdial, str(tmp_path / "texts"))
    assert counts == {"texts": 7, "different": 6}
    listed = json.loads((tmp_path / "texts/train_texts.json").read_text("utf-8"))
    assert listed == dict.fromkeys(
        ("Is it red", "a red ball", "how many?", "two", "why?", "yes"), ""
    )


@pytest.mark.parametrize("reader", ["", "visdial"])
def test_texts_in_chinese_need_no_table(reader, tmp_path):
    """A table of nothing would say that something had been found."""
    rounds = [{"question": 0, "answer": 0}]
    talks = [{"image_id": 7, "caption": "红色的圆", "dialog": rounds}]
    data = {"questions": ["几个？"], "answers": ["3"], "dialogs": talks}
    write(tmp_path / "set/visdial_1.0_train.json", {"data": data})
    picture(tmp_path / "set/images/COCO_train2014_000000000007.jpg")
    with pytest.raises(UserError, match="has no text to be translated"):
        questions.build(str(tmp_path / "set"), str(tmp_path / "texts"), reader=reader)
    assert not (tmp_path / "texts/train_texts.json").exists()
    talks[0]["caption"] = "a red circle"
    write(tmp_path / "set/visdial_1.0_train.json", {"data": data})
    counts = questions.build(str(tmp_path / "set"), str(tmp_path / "texts"))
    assert counts == {"texts": 3, "different": 1, "as_they_are": 2}


def test_vsdial_cn_from_a_table(visdial, tmp_path):
    table, out = write(tmp_path / "zh.json", WORDS), str(tmp_path / "cn")
    options = {"translations": table, "engine": f"{__name__}:hum", "images": f"{tmp_path}/images"}
    counts = vsdial.build(visdial, out, **options)
    shards = {"asr": 3, "spoken": 3}
    assert counts == {"rounds": 3, "left_out": 1, "questions": 2, "shards": shards}
    found = vsdial_cn.examples(out, kind="asr")
    assert [one.transcript for one in found] == ["是红色的吗", "有几个", "是红色的吗"]
    files = [one.media[0][1] for one in found]
    assert files[0] == files[2] != files[1]
    assert [len(speech.read(file)) for file in files[:2]] == [4000 * 6, 4000 * 4]
    assert [e.transcript for e in selection.examples(f"{out}/once")] == ["是红色的吗", "有几个"]
    back = prepared.examples(f"{out}/shards/spoken")
    assert [(one.transcript, one.answer) for one in back] == [
        ("是红色的吗", "是"),
        ("有几个", "两个"),
        ("是红色的吗", "是"),
    ]
    assert [name for name, _ in back[0].media] == ["image", "speech"]
    image.read(back[0].media[0][1])
    times = {file: Path(file).stat().st_mtime_ns for file in files}
    assert vsdial.build(visdial, out, **options) == counts
    assert times == {file: Path(file).stat().st_mtime_ns for file in files}


def test_vsdial_cn_mistakes(visdial, tmp_path):
    out = str(tmp_path / "cn")
    with pytest.raises(UserError, match="exactly one way to translate is needed"):
        vsdial.build(visdial, out)
    with pytest.raises(UserError, match="no speech engine 'nobody:says'"):
        vsdial.build(visdial, out, translations="x", engine="nobody:says")
    with pytest.raises(UserError, match="is no table of texts"):
        vsdial.build(visdial, out, translations=write(tmp_path / "a.json", ["x"]))
    with pytest.raises(UserError, match="translates no round"):
        vsdial.build(visdial, out, translations=write(tmp_path / "a.json", {"why?": "为什么"}))
    with pytest.raises(UserError, match=r"has no config\.json.*mbart-large-50"):
        vsdial.build(visdial, out, translator=str(tmp_path))


@pytest.fixture(scope="module")
def mbart(tmp_path_factory):
    """A folder as facebook/mbart-large-50-many-to-many-mmt is, its model tiny and random."""
    torch, spm = pytest.importorskip("torch"), pytest.importorskip("sentencepiece")
    from transformers import GenerationConfig, MBartConfig, MBartForConditionalGeneration

    folder, buffer = tmp_path_factory.mktemp("mbart"), io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS, *WORDS.values(), "a man, a dog and a red ball"] * 3),
        model_writer=buffer,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(buffer.getvalue())
    torch.manual_seed(1)
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers",)}
    sizes |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = MBartConfig(
        vocab_size=110, d_model=16, max_position_embeddings=32, init_std=0.5, **sizes
    )
    MBartForConditionalGeneration(config).save_pretrained(folder)
    made = GenerationConfig(max_length=12, num_beams=5, decoder_start_token_id=2, eos_token_id=2)
    made.forced_eos_token_id, made.pad_token_id = 2, 1
    made.save_pretrained(folder)
    return folder


def test_mbart_translates_a_text_as_transformers_does(mbart):
    import sentencepiece
    import torch
    from transformers import MBart50Tokenizer, MBartForConditionalGeneration

    pieces = sentencepiece.SentencePieceProcessor(f"{mbart}/sentencepiece.bpe.model")
    known = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = MBart50Tokenizer(vocab=known, src_lang="en_XX", tgt_lang="zh_CN")
    model = MBartForConditionalGeneration.from_pretrained(mbart).eval()
    start = tokenizer.convert_tokens_to_ids("zh_CN")
    texts, alone = [*WORDS, "a man of 7"], []
    for text in texts:
        asked = tokenizer(text, return_tensors="pt")
        ours = translate.Vocabulary(str(mbart)).encode(text, "en_XX", 99)
        assert asked["input_ids"][0].tolist() == ours
        with torch.no_grad():
            ids = model.generate(**asked, forced_bos_token_id=start)
        assert ids[0, 1] == start
        alone.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert len(set(alone)) > 1
    assert translate.Translator(str(mbart))(texts) == alone
    with pytest.raises(UserError, match="knows no language 'tlh'"):
        translate.Translator(str(mbart), target="tlh")(texts)


def test_vsdial_cn_by_mbart(visdial, mbart, tmp_path):
    out, translator = tmp_path / "cn", translate.Translator(str(mbart))
    options = {"translator": str(mbart), "engine": f"{__name__}:hum"}
    with pytest.raises(UserError, match="translates no round"):  # the model has learned nothing
        vsdial.build(visdial, str(out), **options)
    (file,) = (out / "translations").iterdir()
    table = json.loads(file.read_text("utf-8"))
    assert table.keys() == {"Is it red", "a red ball", "how many?", "two", "why?", "yes"}
    assert table == dict(zip(table, translator(list(table))))
    why = json.loads((out / "train_translated.json").read_text("utf-8"))["reasons"]
    assert why.keys() >= {"Is it red", "why?"}
    file.write_text(json.dumps(dict.fromkeys(table, "好")), "utf-8")  # what is there is kept
    assert vsdial.build(visdial, str(out), **options)["rounds"] == 4
    made = json.loads((out / "visdial_1.0_train.json").read_text("utf-8"))["data"]
    assert made["questions"] == ["好"] * 4


def test_vsdial_cn_by_an_endpoint(visdial, tmp_path):
    with serving("500", "prose") as server:
        about = Endpoint(server.url, "fake", wait=0.01)
        counts = vsdial.build(
            visdial, str(tmp_path / "cn"), endpoint=about, engine=f"{__name__}:hum"
        )
    assert (counts["rounds"], counts["left_out"], counts["questions"]) == (4, 0, 3)
    assert (counts["requests"], counts["asked_again"]) == (2, 1)
    made = json.loads((tmp_path / "cn/visdial_1.0_train.json").read_text("utf-8"))["data"]
    asked = ["is it red?", "how many?", "Is it red", "why?"]
    assert made["questions"] == [chinese(text) for text in asked]
    assert [talk["caption"] for talk in made["dialogs"]] == [chinese("a red ball"), ""]


def test_any_set_by_mbart(pairs, mbart, tmp_path):
    """Captions of a table; the model has learned nothing, so that most of it is left out."""
    lines = [
        "filepath\ttitle",
        "0.png\ta man and a dog",
        "1.png\thow many?",
        "2.png\tA man and a dog",
    ]
    write(tmp_path / "pairs/train.tsv", "\n".join(lines))
    out = tmp_path / "out"

    def build():
        return translated.build(pairs, str(out), "table", translator=str(mbart))

    try:
        build()
    except UserError as error:
        assert "translates no text" in str(error)
    (file,) = (out / "translations").iterdir()
    texts = ["how many?", "A man and a dog"]
    assert json.loads(file.read_text("utf-8")) == dict(
        zip(texts, translate.Translator(str(mbart))(texts))
    )
    file.write_text(json.dumps({"how many?": "有几个？", "A man and a dog": "人和狗"}), "utf-8")
    assert build()["translated"] == 2  # what is there is kept
    found = table.examples(pairs, captions=str(out))
    assert [one.answer for one in found] == ["人和狗", "有几个？", "人和狗"]
    config = json.loads((mbart / "config.json").read_text())
    shutil.copytree(mbart, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"d_model": 32}))
    with pytest.raises(UserError, match="holds translations of another translator"):
        translated.build(pairs, str(out), "table", translator=str(tmp_path / "other"))


@pytest.fixture
def pairs(tmp_path):
    """Four captioned images; the last caption is empty."""
    lines = ["filepath\ttitle"]
    for number in range(4):
        picture(tmp_path / f"pairs/{number}.png", 40 * number)
        lines.append(f"{number}.png\t{'' if number == 3 else f'第{number}张'}")
    write(tmp_path / "pairs/train.tsv", "\n".join(lines))
    return str(tmp_path / "pairs")


@pytest.mark.parametrize("form", ["npy", "jsonl", "tsv"])
def test_pairs_that_are_alike(pairs, tmp_path, form):
    values, file, out = [0.44, 0.45, 0.5, 0.9], tmp_path / f"scores.{form}", str(tmp_path / "out")
    named = [(f"train-{number}", value) for number, value in enumerate(values)]
    if form == "npy":
        np.save(file, np.asarray(values, np.float32))
    elif form == "jsonl":
        write(file, "\n".join(json.dumps({"key": k, "similarity": v}) for k, v in named))
    else:
        write(file, "\n".join(f"{k}\t{v}" for k, v in named[:3]))
    counts = similar.build(pairs, out, "table", str(file))
    known = form == "npy"  # the others tell keys, which the broken record has none of
    wanted = {"records": 4, "kept": 2 + known, "unknown": 1 - known, "threshold": 0.45}
    assert counts == wanted
    found = selection.examples(out)
    assert [found[place].answer for place in range(2)] == ["第1张", "第2张"]
    assert found[0].key == "table/train-1" and image.read(found[1].media[0][1]).size == (8, 8)
    assert similar.build(pairs, out, "table", str(file), threshold=0.475)["kept"] == 1 + known


def test_similarity_mistakes(pairs, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    wrong = {
        r"shape \(3,\) for 4 records": str(tmp_path / "a.npy"),
        "is no array of numbers": write(tmp_path / "b.npy", "x"),
        "'high' is no similarity": write(tmp_path / "c.tsv", "train-0\thigh"),
        "keeps nothing": write(tmp_path / "d.tsv", "train-0\t0.1"),
    }
    for message, file in wrong.items():
        with pytest.raises(UserError, match=message):
            similar.build(pairs, str(tmp_path / "out"), "table", file)


def test_a_selection_that_does_not_fit_its_sources_is_refused(pairs, tmp_path):
    from xllm_jax.prepare import pick

    named = {"a": Source("table", pairs)}
    for rows, message in (
        ([[1, 0, -1]], "a source that"),
        ([[0, 4, -1]], r"a record that.*build the selection again"),
        ([[0, 0, 1]], "an instruction that"),
        ([[0, 0]], "has the shape"),
    ):
        pick.write(str(tmp_path / "out"), "train", named, np.asarray(rows), ["问"])
        with pytest.raises(UserError, match=message):
            selection.examples(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"val\.npy: no such file"):
        selection.examples(str(tmp_path / "out"), "val")


def test_resampled_folders_are_read_as_before(beam, tmp_path):
    root = tmp_path / "aishell"
    for speaker in range(3):
        sound(root / f"wav/train/S{speaker}/U{speaker}.wav", 8000 if speaker else 48000)
    (root / "wav/train/S2/U2.wav").write_bytes(b"broken")
    write(root / "transcript/aishell_transcript_v0.8.txt", "U0 你 好\nU1 再 见\nU2 坏\n")
    counts = resampled.build(str(root), str(tmp_path / "out"))
    assert (counts["files"], counts["copied"], counts["rejected"]) == (2, 1, 1)
    found = aishell.examples(str(tmp_path / "out"))
    assert [one.answer for one in found] == ["你好", "再见"]
    assert {soundfile.info(one.media[0][1]).samplerate for one in found} == {16000}
    told = json.loads((tmp_path / "out/resampled.json").read_text("utf-8"))
    assert told["rejects"][0]["file"].endswith("U2.wav")
    assert resampled.build(str(root), str(tmp_path / "out")) == counts
    with pytest.raises(UserError, match="no audio files"):
        resampled.build(str(tmp_path / "empty"), str(tmp_path / "out"))


@pytest.fixture
def four(tmp_path):
    """The four sources of the instruction set, laid out as they are published."""
    root = tmp_path / "data"
    for number in range(8):
        picture(root / f"minigpt4_zh/image/{number}.jpg")
        sound(root / f"aishell2/wav/U{number}.wav")
        sound(root / f"vsdial_cn/audio/{number}.flac")
        picture(root / f"vsdial_cn/images/{number}.jpg")
    (root / "minigpt4_zh/image/5.jpg").write_bytes(b"broken")
    captions = [{"image_id": str(n), "caption": f"图{n}"} for n in range(8)]
    write(root / "minigpt4_zh/filter_cap.json", {"annotations": captions})
    write(root / "aishell2/wav.scp", "\n".join(f"U{n}\twav/U{n}.wav" for n in range(8)))
    write(root / "aishell2/trans.txt", "\n".join(f"U{n}\t句{n}" for n in range(8)))
    spans = {"duration": 1.2, "timestamps": [[0, 0.5], [0.5, 1]], "sentences": ["走", "跑"]}
    write(root / "activitynet/train.json", {"v_a": spans})
    write_video(root / "activitynet/v_a.mp4", 12)
    rounds = [{"question": n, "answer": n, "speech": f"audio/{n}.flac"} for n in range(8)]
    talks = [{"image_id": n, "caption": "", "dialog": rounds[n : n + 1]} for n in range(8)]
    texts = {name: [f"{name}{n}" for n in range(8)] for name in ("questions", "answers")}
    write(root / "vsdial_cn/visdial_1.0_train.json", {"data": texts | {"dialogs": talks}})
    return root


COUNTS = {"minigpt4_zh": 7, "aishell2": 4, "activitynet": 2, "vsdial_cn": 3}


def test_the_instruction_set(beam, four, tmp_path):
    from xllm_jax.configs.sources import INSTRUCTIONS

    def made(name, **options):
        counts = instructions.build(
            str(tmp_path / name), INSTRUCTIONS, str(four), options.pop("counts", COUNTS), **options
        )
        return counts, prepared.examples(f"{tmp_path}/{name}/shards")

    counts, found = made("one")
    assert counts["sources"] == COUNTS and counts["records"] == len(found) == 16
    assert counts["rejected"] == 1 and "cannot be read as an image" in next(iter(counts["reasons"]))
    by_source = {name: [e for e in found if e.key.startswith(f"{name}/")] for name in COUNTS}
    assert {name: len(one) for name, one in by_source.items()} == COUNTS
    for name, media in (("minigpt4_zh", ["image"]), ("vsdial_cn", ["image", "speech"])):
        assert all([kind for kind, _ in one.media] == media for one in by_source[name])
    for one in found:
        assert one.instruction in instructions.INSTRUCTIONS[one.task]
    again, other = made("two")[1], made("three", seed=1)[1]
    assert [(e.key, e.instruction) for e in again] == [(e.key, e.instruction) for e in found]
    assert [e.key for e in other] != [e.key for e in found]
    listed = write(tmp_path / "own.json", {task: ["问"] for task in instructions.INSTRUCTIONS})
    assert {e.instruction for e in made("four", instructions=listed)[1]} == {"问"}
    with pytest.raises(UserError, match="has 7 usable records of 8 wanted"):
        made("five", counts={"minigpt4_zh": 8})
    with pytest.raises(UserError, match="there is no source 'coco'"):
        made("six", counts={"coco": 8})


def test_the_command(visdial, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "xllm_jax.launch.build_data", f"--input={visdial}", *flags]
        return forked.run(command, cwd=ROOT, capture_output=True, text=True)

    out = f"--output={tmp_path / 'texts'}"
    done = run("--recipe=questions", out)
    assert done.stdout == "texts: 7  different: 6\n", done.stderr
    done = run("--recipe=questions", out, "--seed=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--seed: the recipe questions has no such flag" in done.stderr
