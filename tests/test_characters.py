"""The character vocabulary: ids of fairseq, a file a person can read, a round trip."""

from __future__ import annotations

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.characters import CharacterVocabulary, token_count


def test_round_trip_with_special_ids():
    vocabulary = CharacterVocabulary.build(["红色 的圆", "红 方"])
    assert vocabulary.characters[0] == "红"
    ids = vocabulary.encode("红 圆")
    assert ids[0] == 4 and ids[-1] == 2 and len(ids) == token_count("红 圆")
    assert vocabulary.decode([0, 1, *ids, 4, 4]) == "红圆"
    assert vocabulary.encode("猫") == [3, 2]
    assert vocabulary.decode([3, len(vocabulary) + 5]) == "\N{REPLACEMENT CHARACTER}" * 2


def test_file_round_trip_and_fairseq_counts(tmp_path):
    vocabulary = CharacterVocabulary.build(["天地玄黄"])
    vocabulary.save(tmp_path / "characters.txt")
    assert CharacterVocabulary.load(tmp_path / "characters.txt").characters == (
        vocabulary.characters
    )
    (tmp_path / "dict.txt").write_text("天 120\n地 7\n", "utf-8")
    assert CharacterVocabulary.load(tmp_path / "dict.txt").characters == ("天", "地")


def test_rare_characters_are_left_out():
    assert CharacterVocabulary.build(["aab"], least=2).characters == ("a",)


@pytest.mark.parametrize("lines", ["天\n天\n", "天地\n"])
def test_bad_files_are_told(tmp_path, lines):
    (tmp_path / "bad.txt").write_text(lines, "utf-8")
    with pytest.raises(UserError, match=r"bad\.txt"):
        CharacterVocabulary.load(tmp_path / "bad.txt")
    with pytest.raises(UserError, match="no such file"):
        CharacterVocabulary.load(tmp_path / "absent.txt")
